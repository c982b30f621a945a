from __future__ import annotations

import h11
import pytest

from tlsproxy.errors import HttpError
from tlsproxy.http.codec import RequestReader
from tlsproxy.http.heads import RequestHead


def read(data: bytes, header_bytes: int = 4096) -> tuple[RequestHead, RequestReader]:
    reader = RequestReader(header_bytes)
    reader.receive(data)
    head = reader.read_head()
    assert head is not None
    return head, reader


def refused(data: bytes, header_bytes: int = 4096) -> tuple[int, str]:
    reader = RequestReader(header_bytes)
    reader.receive(data)
    with pytest.raises(HttpError) as caught:
        reader.read_head()
    return caught.value.status, caught.value.reason


def test_a_plain_get() -> None:
    head, reader = read(b"GET /a/b?c=d HTTP/1.1\r\nHost: Example.COM:8443\r\nAccept: */*\r\n\r\n")
    assert (head.method, head.target, head.path) == (b"GET", b"/a/b?c=d", b"/a/b")
    assert (head.host, head.host_name) == (b"Example.COM:8443", "example.com")
    assert head.keep_alive
    assert not head.has_body
    assert reader.at_end
    assert (b"accept", b"Accept", b"*/*") in head.fields


def test_bytes_that_come_one_by_one_read_the_same() -> None:
    head_bytes = b"\r\nPOST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head_bytes + b'3\r\nabc\r\n2;x="y"\r\nde\r\n0\r\nT: v\r\n\r\nGET'
    reader = RequestReader(4096)
    head = None
    body = b""
    for index in range(len(data)):
        reader.receive(data[index : index + 1])
        if head is None:
            head = reader.read_head()
        elif not reader.at_end:
            body += reader.read_body()
    assert head is not None
    assert head.chunked
    assert body == b"abcde"
    assert reader.at_end
    assert reader.buffered_bytes == len(b"GET")


def test_pipelined_requests_wait_their_turn() -> None:
    one = b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
    head, reader = read(one + b"GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
    assert head.content_length == 2
    assert not reader.at_end
    assert reader.read_body() == b"hi"
    assert reader.at_end
    second = reader.read_head()
    assert second is not None
    assert second.target == b"/2"
    assert reader.read_head() is None


def test_a_body_with_a_length_passes_without_a_copy() -> None:
    _, reader = read(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n")
    piece = bytes(65536)
    reader.receive(piece)
    assert reader.read_body() is piece


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        ("1.1", "", True),
        ("1.1", "close", False),
        ("1.1", "x, Close", False),
        ("1.0", "", False),
        ("1.0", "Keep-Alive", True),
    ],
)
def test_who_may_use_the_connection_again(version: str, connection: str, keep_alive: bool) -> None:
    field = f"Connection: {connection}\r\n" if connection else ""
    head, _ = read(f"GET / HTTP/{version}\r\nHost: a\r\n{field}\r\n".encode())
    assert head.keep_alive is keep_alive


def test_http_1_0_without_host_is_served() -> None:
    head, _ = read(b"GET / HTTP/1.0\r\n\r\n")
    assert (head.host, head.host_name, head.version) == (b"", "", b"1.0")


def test_absolute_form_is_turned_into_origin_form() -> None:
    head, _ = read(b"GET https://a:1/x?y HTTP/1.1\r\nHost: A:1\r\n\r\n")
    assert head.target == b"/x?y"
    head, _ = read(b"GET http://a?y HTTP/1.1\r\nHost: a\r\n\r\n")
    assert head.target == b"/?y"


BAD_HEADS = [
    ("bare_cr_or_lf", b"GET / HTTP/1.1\nHost: a\n\n"),
    ("bare_cr_or_lf", b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"),
    ("bare_cr_or_lf", b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n"),
    ("folded_line", b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n"),
    ("folded_line", b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n"),
    ("control_character", b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n"),
    ("control_character", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x01\r\n\r\n"),
    ("control_character", b"GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n"),
    ("bad_field", b"GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n"),
    ("bad_field", b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n"),
    ("bad_field", b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n"),
    ("bad_request_line", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_request_line", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n"),
    ("bad_request_line", b"GET / http/1.1\r\nHost: a\r\n\r\n"),
    ("bad_request_line", b"GET /\r\nHost: a\r\n\r\n"),
    ("bad_request_line", b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_request_line", b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
    ("bad_version", b"GET / HTTP/2.7\r\nHost: a\r\n\r\n"),
    ("bad_version", b"GET / HTTP/1.2\r\nHost: a\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    ("bad_host", b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
    ("host_mismatch", b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("host_mismatch", b"GET http://x@a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET * HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /../a HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /%2e%2e/a HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET /a\\..\\b HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("bad_target", b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3,3\r\n\r\n"),
    ("ambiguous_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3,\r\n\r\n"),
    ("ambiguous_length", b"GET / HTTP/1.1\r\ncontent-length:0\r\nHost: a\r\nCONTENT-LENGTH:\t0\r\n\r\n"),
    ("bad_content_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\n"),
    ("bad_content_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x3\r\n\r\n"),
    ("bad_content_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -3\r\n\r\n"),
    ("bad_content_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n"),
    ("bad_content_length", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000000000000\r\n\r\n"),
    ("bad_transfer_encoding", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
    ("bad_transfer_encoding", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, identity\r\n\r\n"),
    (
        "bad_transfer_encoding",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    ),
    ("bad_transfer_encoding", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n"),
]


@pytest.mark.parametrize(("rule", "head"), BAD_HEADS)
def test_a_head_that_breaks_a_rule_is_refused(rule: str, head: bytes) -> None:
    assert refused(head) == (400, rule)


def test_bare_line_feeds_are_refused_before_the_head_ends() -> None:
    assert refused(b"GET / HTTP/1.1\n") == (400, "bare_cr_or_lf")


def test_heads_too_large_are_told_apart() -> None:
    assert refused(b"GET /" + b"a" * 5000) == (414, "header_too_large")
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5000) == (431, "header_too_large")
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 5000 + b"\r\n\r\n") == (431, "header_too_large")
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 100 + b"\r\n") == (431, "too_many_fields")
    read(b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 99 + b"\r\n")


def test_a_head_may_be_as_large_as_its_limit() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 65000 + b"\r\n\r\n"
    assert read(head, len(head))[0].fields[1][2] == b"a" * 65000
    assert refused(head, len(head) - 1) == (431, "header_too_large")


def test_what_takes_h11_long_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its expression for a field tries every way to share out the spaces: 8 s for these.
    monkeypatch.delattr(h11.Connection, "receive_data")
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX:" + b" " * 65000 + b"\v\r\n\r\n"
    assert refused(head, len(head)) == (400, "control_character")


@pytest.mark.parametrize("method", [b"CONNECT", b"TRACE"])
def test_methods_no_reverse_proxy_serves(method: bytes) -> None:
    assert refused(method + b" / HTTP/1.1\r\nHost: a\r\n\r\n") == (501, "method_refused")


BAD_CHUNKS = [
    b"3\nabc\r\n0\r\n\r\n",
    b"3\r\nabcd\r\n0\r\n\r\n",
    b"3\r\nabc\n0\r\n\r\n",
    b"3 \r\nabc\r\n0\r\n\r\n",
    b" 3\r\nabc\r\n0\r\n\r\n",
    b"0x3\r\nabc\r\n0\r\n\r\n",
    b"+3\r\nabc\r\n0\r\n\r\n",
    b"-3\r\nabc\r\n0\r\n\r\n",
    b"\r\nabc\r\n0\r\n\r\n",
    b"g\r\nabc\r\n0\r\n\r\n",
    b"1000000000000000\r\n",
    b"3;\r\nabc\r\n0\r\n\r\n",
    b"3;a=\r\nabc\r\n0\r\n\r\n",
    b'3;a="b\r\nabc\r\n0\r\n\r\n',
    b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    b"3;" + b"a" * 300,
    b"0\r\nT : v\r\n\r\n",
    b"0\r\nT: v\r\n w\r\n\r\n",
    b"0\r\nT: v\nU: w\r\n\r\n",
    b"0\r\n\nX",
    b"0\r\nT: " + b"v" * 9000,
]


@pytest.mark.parametrize("chunks", BAD_CHUNKS)
def test_broken_chunks_are_refused(chunks: bytes) -> None:
    _, reader = read(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    with pytest.raises(HttpError) as caught:
        reader.read_body()
    assert caught.value.status == 400


def test_body_limits() -> None:
    _, reader = read(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n")
    with pytest.raises(HttpError, match="413"):
        reader.limit_body(10)
    _, reader = read(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n")
    reader.limit_body(10)
    assert reader.read_body() == b"0123456789"
    reader.receive(b"1\r\n")
    assert reader.read_body() == b""
    reader.receive(b"x")
    with pytest.raises(HttpError, match="413"):
        reader.read_body()


def test_the_limit_of_one_body_does_not_reach_the_next() -> None:
    post = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nabcd"
    _, reader = read(post * 2)
    reader.limit_body(4)
    assert reader.read_body() == b"abcd"
    assert reader.read_head() is not None
    assert reader.read_body() == b"abcd"


def test_chunks_are_decoded_a_millisecond_at_a_time_and_all_the_same() -> None:
    _, reader = read(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1500)
    body = [reader.read_body()]
    while reader.has_more:
        body.append(reader.read_body())
    assert max(map(len, body)) == 512
    assert b"".join(body) == b"x" * 1500
    reader.receive(b"0\r\n\r\n")
    assert reader.read_body() == b""
    assert reader.at_end


def test_the_last_chunk_may_be_the_first_of_the_next_call() -> None:
    chunks = b"1\r\nx\r\n" * 512 + b"0\r\nA: b\r\n\r\n"
    _, reader = read(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert len(reader.read_body()) == 512
    assert not reader.at_end
    assert reader.read_body() == b""
    assert reader.at_end


def test_trailers_are_kept_for_who_asks() -> None:
    _, reader = read(
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nDigest:  y \r\nB:\r\n\r\n"
    )
    assert reader.read_body() == b"x"
    assert reader.trailers == [(b"digest", b"Digest", b"y"), (b"b", b"B", b"")]


@pytest.mark.parametrize(
    ("fields", "upgrade"),
    [
        (b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"websocket"),
        (b"Connection: keep-alive, upgrade\r\nUpgrade: foo/2\r\n", b"foo/2"),
        (b"Upgrade: websocket\r\n", b""),
        (b"Connection: upgrade\r\n", b""),
        (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: HTTP/2.0\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: websocket, h2c\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n", b""),
        (b"Connection: upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n", b""),
    ],
)
def test_which_upgrades_may_be_asked_for(fields: bytes, upgrade: bytes) -> None:
    head, _ = read(b"GET / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
    assert head.upgrade == upgrade


@pytest.mark.parametrize(
    ("value", "takes"), [(b"trailers", True), (b"gzip;q=0.5, Trailers", True), (b"gzip", False), (b"", False)]
)
def test_who_takes_trailers(value: bytes, takes: bool) -> None:
    head, _ = read(b"GET / HTTP/1.1\r\nHost: a\r\nTE: " + value + b"\r\n\r\n")
    assert head.takes_trailers is takes
