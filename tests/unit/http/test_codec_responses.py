from __future__ import annotations

import pytest

from tlsproxy.errors import UpstreamError
from tlsproxy.http.codec import ResponseReader
from tlsproxy.http.heads import ResponseHead


def read(data: bytes, method: bytes = b"GET") -> tuple[ResponseHead, ResponseReader]:
    reader = ResponseReader()
    reader.receive(data)
    head = reader.read_head(method)
    assert head is not None
    return head, reader


def test_a_response_with_a_length() -> None:
    head, reader = read(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-a:  b c \t\r\n\r\nhel")
    assert (head.status, head.reason, head.content_length, head.has_body) == (200, b"OK", 5, True)
    assert (b"x-a", b"X-a", b"b c") in head.fields
    assert reader.read_body() == b"hel"
    assert not reader.at_end
    reader.receive(b"lo")
    assert reader.read_body() == b"lo"
    assert reader.at_end
    assert reader.keep_alive
    assert reader.buffered_bytes == 0


def test_a_chunked_response() -> None:
    _, reader = read(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n")
    assert reader.read_body() == b"abcd"
    assert reader.at_end


def test_a_body_until_close_ends_with_the_connection() -> None:
    head, reader = read(b"HTTP/1.1 200 OK\r\n\r\nabc")
    assert head.content_length is None
    assert reader.read_body() == b"abc"
    assert not reader.at_end
    reader.end_of_input()
    assert reader.at_end
    assert not reader.keep_alive


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_a_body_cut_short_is_an_error(framing: bytes) -> None:
    _, reader = read(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n3\r\n")
    reader.read_body()
    with pytest.raises(UpstreamError, match="truncated_body"):
        reader.end_of_input()


@pytest.mark.parametrize(("method", "status", "length"), [(b"HEAD", 200, 5), (b"GET", 204, 0), (b"GET", 304, 5)])
def test_responses_without_a_body(method: bytes, status: int, length: int) -> None:
    head, reader = read(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, length), method)
    assert not head.has_body
    assert head.content_length == length
    assert reader.at_end


def test_an_interim_response_is_followed_by_another_head() -> None:
    head, reader = read(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert head.status == 103
    assert not reader.at_end
    final = reader.read_head(b"GET")
    assert final is not None
    assert final.status == 200
    assert reader.at_end


def test_a_server_that_closes_before_its_response() -> None:
    reader = ResponseReader()
    reader.receive(b"HTTP/1.1 200")
    assert reader.read_head(b"GET") is None
    with pytest.raises(UpstreamError, match="closed_before_response"):
        reader.end_of_input()


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [(b"1.1", b"x", True), (b"1.1", b"close", False), (b"1.0", b"x", False), (b"1.0", b"keep-alive", True)],
)
def test_which_connections_carry_another_request(version: bytes, connection: bytes, keep_alive: bool) -> None:
    head, _ = read(b"HTTP/%b 200 OK\r\nContent-Length: 0\r\nConnection: %b\r\n\r\n" % (version, connection))
    assert head.keep_alive is keep_alive


BAD_HEADS = [
    ("bare_cr_or_lf", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ("folded_line", b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n"),
    ("control_character", b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n"),
    ("bad_field", b"HTTP/1.1 200 OK\r\nX : a\r\n\r\n"),
    ("bad_field", b"HTTP/1.1 200 OK\r\n: a\r\n\r\n"),
    ("bad_field", b"HTTP/1.1 200 OK\r\nX\r\n\r\n"),
    ("bad_status_line", b"HTTP/2.0 200 OK\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1 2000 OK\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1 20 OK\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1  200 OK\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1 2OO OK\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1 099 OK\r\n\r\n"),
    ("bad_status_line", b"ICY 200 OK\r\n\r\n"),
    ("bad_status_line", b"hello\r\n\r\n"),
    ("bad_status_line", b"HTTP/1.1 600 X\r\n\r\n"),
    ("bad_upgrade", b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n"),
    ("bad_upgrade", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    ("body_not_allowed", b"HTTP/1.1 100 Continue\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("body_not_allowed", b"HTTP/1.1 103 Early Hints\r\nContent-Length: 3\r\n\r\n"),
    ("body_not_allowed", b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n"),
    ("body_not_allowed", b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("ambiguous_length", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n"),
    ("ambiguous_length", b"HTTP/1.1 200 OK\r\nContent-Length: 1, 1\r\n\r\n"),
    ("bad_content_length", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
    ("bad_content_length", b"HTTP/1.1 200 OK\r\nContent-Length: \r\n\r\n"),
    ("bad_content_length", b"HTTP/1.1 200 OK\r\nContent-Length: 1 1\r\n\r\n"),
    ("ambiguous_length", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("bad_transfer_encoding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
    ("bad_transfer_encoding", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("bad_transfer_encoding", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("header_too_large", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000),
    ("too_many_fields", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 101 + b"\r\n"),
    ("bad_status_line", b"\r\n\r\n"),
]


@pytest.mark.parametrize(("rule", "head"), BAD_HEADS)
def test_a_head_that_breaks_a_rule_is_refused(rule: str, head: bytes) -> None:
    reader = ResponseReader()
    reader.receive(head)
    with pytest.raises(UpstreamError) as caught:
        reader.read_head(b"GET")
    assert (caught.value.status, caught.value.reason) == (502, rule)


def test_a_second_response_on_one_connection() -> None:
    _, reader = read(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    reader.read_body()
    reader.next_response()
    assert not reader.at_end
    reader.receive(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    head = reader.read_head(b"GET")
    assert head is not None
    assert head.status == 404
    assert reader.at_end


def test_what_follows_a_switch_of_protocols_is_no_http() -> None:
    head, reader = read(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n\x81\x00"
    )
    assert (head.status, head.upgrade) == (101, b"WebSocket")
    assert reader.take_buffered() == b"\x81\x00"
    assert reader.buffered_bytes == 0
