from __future__ import annotations

import pytest

from tests.routes import NO_RULES
from tlsproxy.config import HeaderRules
from tlsproxy.http.codec import RequestReader, ResponseReader
from tlsproxy.http.forwarding import (
    Hop,
    RequestRules,
    ResponseRules,
    client_address,
    client_cert_field,
    request_head,
    response_head,
)
from tlsproxy.http.heads import RequestHead
from tlsproxy.http.replies import own_reply, redirect_reply

HOP = Hop(b"192.0.2.7", b"https", b"0123", b"127.0.0.1:8000", trusted=False, forwarded=False)


def request_of(head: bytes) -> RequestHead:
    reader = RequestReader(65536)
    reader.receive(head)
    request = reader.read_head()
    assert request is not None
    return request


def forwarded(head: bytes, hop: Hop = HOP, rules: HeaderRules = NO_RULES) -> list[bytes]:
    lines = request_head(request_of(head), hop, RequestRules(rules)).split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    return lines[:-2]


def returned(
    head: bytes,
    *,
    method: bytes = b"GET",
    chunked: bool = False,
    http_1_0: bool = False,
    rules: ResponseRules = ResponseRules(NO_RULES),  # noqa: B008 - never changed
) -> list[bytes]:
    reader = ResponseReader()
    reader.receive(head)
    response = reader.read_head(method)
    assert response is not None
    return response_head(response, rules, chunked=chunked, http_1_0=http_1_0, keep_alive=True).split(b"\r\n")[:-2]


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
        b"Proxy: 1.1.1.1\r\nx-forwarded-proto: 1.1.1.1\r\nX-Forwarded-Ssl: 1.1.1.1\r\nX-Forwarded-Prefix: 1.1.1.1\r\n"
        b"X-Forward: kept\r\n\r\n"
    )
    assert not any(b"1.1.1.1" in line for line in lines)
    assert b"X-Forward: kept" in lines


@pytest.mark.parametrize("name", [b"SCRIPT_NAME", b"X_User", b"x-user_", b"X.User", b"X!User", b"X'User", b"~", b"_"])
def test_a_name_that_a_server_may_read_as_another_does_not_go_on(name: bytes) -> None:
    rules = HeaderRules((("X-User", "nobody"),), (), ())
    lines = forwarded(b"GET / HTTP/1.1\r\nHost: a\r\n%b: root\r\n\r\n" % name, rules=rules)
    assert not any(b"root" in line for line in lines)
    assert b"X-User: nobody" in lines


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("own", [b"", client_cert_field(b"verified")])
def test_nobody_but_the_proxy_says_what_the_clients_certificate_is(trusted: bool, own: bytes) -> None:
    names = ("Client-Cert", "client-cert", "CLIENT_CERT", "Client_Cert", "client-Cert_Chain", "Client-Cert-Chain")
    fields = b"".join(b"%b: :bGllcw==:\r\n" % name.encode() for name in names)
    head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: client-cert\r\n%b\r\n" % fields
    lines = forwarded(head, HOP._replace(trusted=trusted, client_cert=own))
    said = [line for line in lines if line.lower().startswith((b"client-", b"client_"))]
    assert said == ([b"Client-Cert: :dmVyaWZpZWQ=:"] if own else [])


def test_hop_by_hop_fields_end_here() -> None:
    lines = forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Secret\r\nX-Secret: 1\r\nKeep-Alive: 5\r\n"
        b"TE: gzip\r\n"
        b"Upgrade: h2c\r\nProxy-Connection: x\r\nProxy-Authorization: x\r\nCookie: c\r\n\r\n"
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


INBOUND = (
    b"GET / HTTP/1.1\r\nHost: a:8443\r\nX-Forwarded-For: 198.51.100.1\r\nX-Forwarded-For: 10.0.0.9\r\n"
    b"X-Forwarded-Proto: http\r\nX-Forwarded-Host: b\r\nX-Forwarded-Port: 80\r\nX-Request-ID: theirs\r\n"
    b"X-Real-IP: 198.51.100.1\r\nX-Forwarded-Server: c\r\n%b\r\n"
)


def test_a_trusted_proxy_is_believed_and_its_list_goes_on() -> None:
    assert forwarded(INBOUND % b"Forwarded: for=198.51.100.1\r\n", HOP._replace(trusted=True))[1:] == [
        b"Host: a:8443",
        b"X-Forwarded-For: 198.51.100.1, 10.0.0.9, 192.0.2.7",
        b"X-Forwarded-Proto: http",
        b"X-Forwarded-Host: b",
        b"X-Request-ID: theirs",
        b"X-Forwarded-Port: 80",
        b'Forwarded: for=198.51.100.1, for=192.0.2.7;host="a:8443";proto=https',
        b"Via: 1.1 tlsproxy",
    ]


def test_a_trusted_proxy_that_says_nothing_changes_nothing() -> None:
    head = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For:\r\n\r\n"
    assert forwarded(head, HOP._replace(trusted=True)) == forwarded(head)


def test_forwarded_is_written_where_asked_for() -> None:
    lines = forwarded(INBOUND % b"Forwarded: for=1.1.1.1\r\n", HOP._replace(forwarded=True))
    assert lines[2] == b"X-Forwarded-For: 192.0.2.7"
    assert b'Forwarded: for=192.0.2.7;host="a:8443";proto=https' in lines
    lines = forwarded(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", HOP._replace(forwarded=True, client_ip=b"2001:db8::1"))
    assert b'Forwarded: for="[2001:db8::1]";host=a;proto=https' in lines


@pytest.mark.parametrize(
    ("field", "address"),
    [
        (b"", "10.0.0.1"),
        (b"198.51.100.1", "198.51.100.1"),
        (b"198.51.100.1, 10.0.0.9", "198.51.100.1"),
        (b"1.1.1.1, 198.51.100.1, 10.0.0.9", "198.51.100.1"),
        (b"10.0.0.8, 10.0.0.9", "10.0.0.8"),
        (b"198.51.100.1, unknown, 10.0.0.9", "10.0.0.9"),
        (b"198.51.100.1, \xff", "10.0.0.1"),
        (b"198.51.100.1, ::ffff:10.0.0.9", "198.51.100.1"),
        (b"::ffff:c633:6401", "198.51.100.1"),
        (b"fe80::1%\xff", "10.0.0.1"),
        (b"fe80::1%eth0, 10.0.0.9", "10.0.0.9"),
    ],
)
def test_the_client_is_the_last_address_that_is_no_trusted_proxy(field: bytes, address: str) -> None:
    request = request_of(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: %b\r\n\r\n" % field)
    assert client_address(request, "10.0.0.1", lambda ip: ip.startswith("10.")) == address


def test_header_rules_of_a_route_for_requests() -> None:
    rules = HeaderRules(
        set=(("X-Set", "new"), ("Host", "inside.example")), add=(("X-Add", "2"),), remove=("Cookie", "X-Gone")
    )
    assert forwarded(
        b"GET / HTTP/1.1\r\nHost: a\r\nx-set: old\r\nX-Set: older\r\nX-Add: 1\r\nCookie: c\r\nx-gone: g\r\n\r\n",
        rules=rules,
    ) == [
        b"GET / HTTP/1.1",
        b"Host: inside.example",
        b"X-Add: 1",
        b"X-Forwarded-For: 192.0.2.7",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: a",
        b"X-Request-ID: 0123",
        b"X-Set: new",
        b"X-Add: 2",
        b"Via: 1.1 tlsproxy",
    ]


def test_header_rules_of_a_route_for_responses() -> None:
    rules = ResponseRules(
        HeaderRules(set=(("Server", "s"),), add=(("X-Add", "2"),), remove=("X-Powered-By",)), (("X-Always", "a"),)
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nServer: x\r\nx-powered-by: p\r\nX-Add: 1\r\nx-always: x\r\n\r\n"
    assert returned(head, rules=rules) == [
        b"HTTP/1.1 200 OK", b"X-Add: 1", b"Server: s", b"X-Add: 2", b"X-Always: a", b"Content-Length: 0",
    ]  # fmt: skip
    assert returned(b"HTTP/1.1 103 Early Hints\r\nX-Powered-By: p\r\nLink: l\r\n\r\n", rules=rules) == [
        b"HTTP/1.1 103 Early Hints",
        b"Link: l",
    ]


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
    head, body = own_reply(502)
    assert (head.status, head.reason, body) == (502, b"Bad Gateway", b"502 Bad Gateway\n")
    assert (head.content_length, head.has_body) == (len(body), True)
    redirect = redirect_reply(301, "https://a/")
    rules = ResponseRules(NO_RULES, [("X", "1")])
    assert response_head(redirect, rules, chunked=False, http_1_0=False, keep_alive=False) == (
        b"HTTP/1.1 301 Moved Permanently\r\nLocation: https://a/\r\nX: 1\r\nContent-Length: 0\r\n"
        b"Connection: close\r\n\r\n"
    )
