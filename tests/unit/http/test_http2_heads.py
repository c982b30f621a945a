"""What a request in HTTP/2 is in HTTP/1.1, and a response the other way round."""

from __future__ import annotations

import pytest
from hpack.struct import NeverIndexedHeaderTuple

from tlsproxy.config import HeaderRules
from tlsproxy.errors import HttpError
from tlsproxy.http.codec import ResponseReader
from tlsproxy.http.forwarding import ResponseRules
from tlsproxy.http.http2_heads import request_of, response_fields, trailer_fields, trailers_of

NO_RULES = ResponseRules(HeaderRules((), (), ()))


def fields(*more: tuple[bytes, bytes], **pseudo: bytes) -> list[tuple[bytes, bytes]]:
    present = {"method": b"GET", "scheme": b"https", "authority": b"a", "path": b"/", **pseudo}
    return [*((b":" + name.encode(), value) for name, value in present.items() if value), *more]


def refused(*more: tuple[bytes, bytes], **pseudo: bytes) -> tuple[int, str]:
    with pytest.raises(HttpError) as caught:
        request_of(fields(*more, **pseudo), ended=True)
    return caught.value.status, caught.value.reason


def test_a_plain_get() -> None:
    request = request_of(fields((b"accept", b"*/*"), authority=b"Example.COM:8443", path=b"/a/../b?c"), ended=True)
    assert (request.method, request.target, request.path) == (b"GET", b"/a/../b?c", b"/b")
    assert (request.host, request.host_name) == (b"Example.COM:8443", "example.com")
    assert request.fields == [(b"accept", b"accept", b"*/*")]
    assert (request.version, request.has_body, request.takes_trailers) == (b"2.0", False, False)


def test_bodies_and_what_is_known_of_them() -> None:
    assert request_of(fields(), ended=False).chunked
    known = request_of(fields((b"content-length", b"5")), ended=False)
    assert (known.chunked, known.content_length, known.has_body) == (False, 5, True)
    empty = request_of(fields((b"content-length", b"0")), ended=True)
    assert (empty.content_length, empty.has_body) == (0, False)
    assert request_of(fields((b"te", b"trailers")), ended=False).takes_trailers


def test_host_stands_in_for_authority() -> None:
    assert request_of(fields((b"host", b"b"), authority=b""), ended=True).host == b"b"
    assert refused(authority=b"") == (400, "bad_host")


def test_options_of_the_server() -> None:
    assert request_of(fields(method=b"OPTIONS", path=b"*"), ended=True).target == b"*"
    assert refused(path=b"*") == (400, "bad_target")


@pytest.mark.parametrize(
    ("pseudo", "rule"),
    [
        ({"path": b"http://a/"}, "bad_target"),
        ({"path": b"/a b"}, "bad_target"),
        ({"path": b"/a HTTP/1.1\r\nx: y"}, "bad_target"),
        ({"path": b"/\xff"}, "bad_target"),
        ({"path": b"/a#b"}, "bad_target"),
        ({"path": b"a"}, "bad_target"),
        ({"path": b"/.."}, "bad_target"),
        ({"path": b"/%00"}, "bad_target"),
        ({"method": b"GET /x HTTP/1.1\r\n"}, "bad_request_line"),
        ({"method": b"G T"}, "bad_request_line"),
        ({"scheme": b"file"}, "bad_request_line"),
        ({"authority": b"user@a"}, "bad_host"),
        ({"authority": b"a/b"}, "bad_host"),
        ({"authority": b"a\r\nx: y"}, "bad_host"),
    ],
)
def test_what_cannot_be_said_in_http_1_1(pseudo: dict[str, bytes], rule: str) -> None:
    assert refused(**pseudo) == (400, rule)


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ((b"a:b", b""), "bad_field"),
        ((b"a b", b""), "bad_field"),
        ((b"A", b""), "bad_field"),
        ((b"", b""), "bad_field"),
        ((b"a(", b""), "bad_field"),
        ((b"connection", b"close"), "bad_field"),
        ((b"transfer-encoding", b"chunked"), "bad_field"),
        ((b"upgrade", b"h2c"), "bad_field"),
        ((b"a", b" b"), "bad_field"),
        ((b"a", b"b\t"), "bad_field"),
        ((b"a", b"b\nc"), "control_character"),
        ((b"a", b"b\rc"), "control_character"),
        ((b"a", b"\x00"), "control_character"),
        ((b"a", b"\x7f"), "control_character"),
    ],
)
def test_fields_that_are_none(field: tuple[bytes, bytes], rule: str) -> None:
    assert refused(field) == (400, rule)
    with pytest.raises(HttpError, match=rule):
        trailers_of([field])


def test_pseudo_header_fields_come_first_and_once() -> None:
    for wrong in (
        [*fields(), (b":path", b"/again")],
        [*fields(), (b":unknown", b"1")],
        [*fields(), (b":status", b"200")],
        [*fields(), (b":protocol", b"websocket")],
        [(b"x", b"1"), *fields()],
        fields(method=b""),
        fields(scheme=b""),
        fields(path=b""),
        [],
    ):
        with pytest.raises(HttpError, match=r"bad_request_line|bad_field"):
            request_of(wrong, ended=True)


def test_there_is_one_host() -> None:
    assert request_of(fields((b"host", b"a")), ended=True).host == b"a"
    assert refused((b"host", b"b")) == (400, "host_mismatch")
    assert refused((b"host", b"a"), (b"host", b"a")) == (400, "bad_host")


def test_te_says_trailers_or_nothing() -> None:
    assert refused((b"te", b"gzip")) == (400, "bad_field")


def test_lengths_must_be_one() -> None:
    assert refused((b"content-length", b"5"), (b"content-length", b"5")) == (400, "ambiguous_length")
    assert refused((b"content-length", b"+5")) == (400, "bad_content_length")
    assert refused((b"content-length", b"5")) == (400, "wrong_length")


def test_methods_that_are_refused() -> None:
    assert refused(method=b"CONNECT", scheme=b"", path=b"") == (501, "method_refused")
    assert refused((b":protocol", b"websocket"), method=b"CONNECT") == (501, "method_refused")
    assert refused(method=b"TRACE") == (501, "method_refused")


def test_too_many_fields() -> None:
    many = [(b"x", b"y")] * 101
    assert refused(*many) == (431, "too_many_fields")
    with pytest.raises(HttpError, match="too_many_fields"):
        trailers_of(many)


def returned(head: bytes, rules: ResponseRules = NO_RULES, method: bytes = b"GET") -> list[tuple[bytes, bytes]]:
    reader = ResponseReader()
    reader.receive(head)
    response = reader.read_head(method)
    assert response is not None
    return response_fields(response, rules)


def test_a_response() -> None:
    rules = ResponseRules(HeaderRules((("X-Set", "1"),), (("X-Add", "2"),), ("Server",)), [("Always", "3")])
    assert returned(
        b"HTTP/1.1 200 Fine\r\nServer: s\r\nX-Set: 0\r\nX-Add: 0\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: 1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        rules,
    ) == [(b":status", b"200"), (b"x-add", b"0"), (b"x-set", b"1"), (b"x-add", b"2"), (b"always", b"3")]


def test_lengths_of_responses() -> None:
    assert returned(b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\n", method=b"HEAD")[1] == (b"content-length", b"5")
    assert returned(b"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n") == [(b":status", b"204")]
    assert returned(b"HTTP/1.1 103 X\r\nLink: a\r\n\r\n") == [(b":status", b"103"), (b"link", b"a")]


def test_cookies_never_enter_the_compressions_table() -> None:
    cookie = returned(b"HTTP/1.1 200 X\r\nSet-Cookie: a\r\nContent-Length: 0\r\n\r\n")[1]
    assert cookie == (b"set-cookie", b"a")
    assert isinstance(cookie, NeverIndexedHeaderTuple)


def test_trailers_of_a_response() -> None:
    trailers = [(b"x-sum", b"X-Sum", b"1"), (b"set-cookie", b"Set-Cookie", b"a"), (b"connection", b"Connection", b"x")]
    assert trailer_fields(trailers, NO_RULES) == [(b"x-sum", b"1")]
