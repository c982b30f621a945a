from __future__ import annotations

from tlsproxy.http.codec import RequestReader, ResponseReader
from tlsproxy.http.forwarding import Hop, request_head, response_head
from tlsproxy.http.replies import error_reply

HOP = Hop(b"192.0.2.7", b"https", b"0123", b"127.0.0.1:8000")


def forwarded(head: bytes) -> list[bytes]:
    reader = RequestReader(65536)
    reader.receive(head)
    request = reader.read_head()
    assert request is not None
    lines = request_head(request, HOP).split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    return lines[:-2]


def returned(head: bytes, *, method: bytes = b"GET", chunked: bool = False, http_1_0: bool = False) -> list[bytes]:
    reader = ResponseReader()
    reader.receive(head)
    response = reader.read_head(method)
    assert response is not None
    return response_head(response, chunked=chunked, http_1_0=http_1_0, keep_alive=True).split(b"\r\n")[:-2]


def test_what_the_server_is_told() -> None:
    assert forwarded(b"GET /x?y HTTP/1.1\r\nhost: www.example.com\r\nAccept: */*\r\n\r\n") == [
        b"GET /x?y HTTP/1.1",
        b"Host: www.example.com",
        b"Accept: */*",
        b"X-Forwarded-For: 192.0.2.7",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: www.example.com",
        b"X-Request-ID: 0123",
        b"Via: 1.1 tlsproxy",
    ]


def test_what_a_client_says_of_itself_is_not_believed() -> None:
    lines = forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 1.1.1.1\r\nX_Forwarded_For: 1.1.1.1\r\n"
        b"Forwarded: for=1.1.1.1\r\nX-Real-IP: 1.1.1.1\r\nX-Request-Id: 1.1.1.1\r\n"
        b"Proxy: 1.1.1.1\r\nx-forwarded-proto: 1.1.1.1\r\nmy_own: kept\r\n\r\n"
    )
    assert not any(b"1.1.1.1" in line for line in lines)
    assert b"my_own: kept" in lines


def test_hop_by_hop_fields_end_here() -> None:
    lines = forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\n"
        b"TE: trailers\r\n"
        b"Upgrade: h2c\r\nProxy-Connection: x\r\nProxy-Authorization: x\r\nTrailer: x\r\nCookie: c\r\n\r\n"
    )
    assert [line.partition(b":")[0] for line in lines[1:]] == [
        b"Host", b"Cookie", b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"X-Request-ID", b"Via",
    ]  # fmt: skip


def test_connection_can_not_take_away_what_the_proxy_says() -> None:
    lines = forwarded(
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: host, content-length, x-forwarded-for\r\n\r\n"
    )
    assert b"Host: a" in lines
    assert b"Content-Length: 3" in lines
    assert b"X-Forwarded-For: 192.0.2.7" in lines


def test_framing_is_written_once_and_anew() -> None:
    lines = forwarded(b"POST / HTTP/1.1\r\nHost: a\r\ntransfer-encoding:  Chunked \r\n\r\n")
    assert [line for line in lines if b"ncoding" in line] == [b"Transfer-Encoding: chunked"]
    lines = forwarded(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 007\r\n\r\n")
    assert [line for line in lines if b"ength" in line] == [b"Content-Length: 7"]


def test_via_of_earlier_proxies_is_kept_in_order() -> None:
    lines = forwarded(b"GET / HTTP/1.0\r\nHost: a\r\nVia: 1.1 x\r\nVia: 1.1 y, 1.0 z\r\n\r\n")
    assert b"Via: 1.1 x, 1.1 y, 1.0 z, 1.0 tlsproxy" in lines


def test_a_client_without_host_gets_the_servers_name() -> None:
    assert b"Host: 127.0.0.1:8000" in forwarded(b"GET / HTTP/1.0\r\n\r\n")


def test_what_the_client_is_told() -> None:
    assert returned(
        b"HTTP/1.1 200 Fine\r\nContent-Length: 2\r\nServer: s\r\nConnection: x-internal\r\nX-Internal: 1\r\n"
        b"Keep-Alive: 1\r\n"
        b"Set-Cookie: a\r\nSet-Cookie: b\r\n\r\n"
    ) == [b"HTTP/1.1 200 Fine", b"Server: s", b"Set-Cookie: a", b"Set-Cookie: b", b"Content-Length: 2"]


def test_response_framing() -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert returned(chunked, chunked=True) == [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked"]
    assert returned(b"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n") == [b"HTTP/1.1 204 X"]
    assert returned(b"HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\n", method=b"HEAD")[1] == b"Content-Length: 9"
    assert returned(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n", http_1_0=True)[2] == b"Connection: keep-alive"


def test_the_proxys_own_replies() -> None:
    assert error_reply(502, keep_alive=True).endswith(b"Connection: keep-alive\r\n\r\n502 Bad Gateway\n")
    head = error_reply(404, keep_alive=False, head_only=True)
    assert head.endswith(b"Connection: close\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(b"404 Not Found\n") in head
