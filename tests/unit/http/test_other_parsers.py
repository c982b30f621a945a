"""What goes on to a server is read alike by parsers in wide use (h11, llhttp), and as it was meant.

Requests come from the corpus, and from what the corpus becomes by chance: whatever is accepted is one request to all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h11
import httptools
import pytest
import yaml

from tlsproxy.config import HeaderRules
from tlsproxy.errors import HttpError, UpstreamError
from tlsproxy.http.chunks import chunk, last_chunk
from tlsproxy.http.codec import RequestReader, ResponseReader
from tlsproxy.http.forwarding import Hop, RequestRules, request_head
from tlsproxy.http.heads import RequestHead

CORPUS = Path(__file__).parents[2] / "conformance" / "requests.yaml"
SPICE = [b"\r", b"\n", b"\r\n", b" ", b"\t", b"\0", b":", b",", b";", b"0", b"5", b"\x80", b"Host: h\r\n", b"a", b"-"]
RULES = RequestRules(HeaderRules((), (), ()))
HOP = Hop(b"127.0.0.1", b"https", b"id", b"h", trusted=False, forwarded=False)
LLHTTP_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS"))


class Reading(NamedTuple):
    """A request as one parser understands it."""

    method: bytes
    target: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes


def accept(data: bytes) -> tuple[RequestHead, bytes, bytes] | None:
    """Return the first request in `data` if it is accepted and whole: head, body, and what is sent on."""
    reader = RequestReader(1 << 14)
    reader.receive(data)
    try:
        head = reader.read_head()
        if head is None:
            return None
        body = reader.read_body()
    except HttpError:
        return None
    if not reader.at_end:
        return None
    sent = request_head(head, HOP, RULES)
    if head.chunked:
        sent += b"".join(chunk(body)) if body else b""
        sent += last_chunk(reader.trailers, RULES.not_sent)
    else:
        sent += body
    return head, body, sent


def read_by_h11(data: bytes) -> Reading:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data)
    request = connection.next_event()
    assert isinstance(request, h11.Request)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert connection.trailing_data[0] == b""
    fields = [(name.lower(), value) for name, value in request.headers.raw_items()]
    return Reading(request.method, request.target, fields, body)


class _Collected:
    def __init__(self) -> None:
        self.target, self.body = b"", b""
        self.fields: list[tuple[bytes, bytes]] = []
        self.ended = False

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        assert not self.ended, "a second request"
        self.fields.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.ended = True


def read_by_llhttp(data: bytes) -> Reading:
    collected = _Collected()
    parser = httptools.HttpRequestParser(collected)
    parser.feed_data(data)
    assert collected.ended
    return Reading(parser.get_method(), collected.target, collected.fields, collected.body)


def compare(data: bytes) -> bool:
    """Compare the readings of what is accepted; tell whether it was."""
    accepted = accept(data)
    if accepted is None:
        return False
    head, body, sent = accepted
    reading = read_by_h11(sent)
    assert (reading.method, reading.target, reading.body) == (head.method, head.target, body)
    if head.method in LLHTTP_METHODS and not head.upgrade:
        by_llhttp = read_by_llhttp(sent)
        assert by_llhttp[:2] + by_llhttp[3:] == reading[:2] + reading[3:]
        # Trailers, which belong to no header, llhttp calls back in the same way.
        assert by_llhttp.fields[: len(reading.fields)] == reading.fields
    return True


def corpus(kind: str) -> list[bytes]:
    """Return the requests that break or keep a rule."""
    cases = yaml.safe_load(CORPUS.read_text("utf-8"))
    return [case["send"].encode("latin-1") for case in cases if kind in case and isinstance(case["send"], str)]


@pytest.mark.parametrize("data", corpus("keeps"))
def test_what_keeps_the_rules(data: bytes) -> None:
    assert compare(data)


@pytest.mark.parametrize("data", [data for data in corpus("breaks") if not data.startswith((b"CONNECT", b"TRACE"))])
def test_what_breaks_a_rule_is_not_accepted(data: bytes) -> None:
    assert not compare(data)


def test_what_the_corpus_becomes_by_chance() -> None:
    chance = random.Random(20240611)
    messages = corpus("keeps") * 3 + corpus("breaks")
    accepted = 0
    for _ in range(8000):
        data = chance.choice(messages)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(data))
            data = data[:at] + chance.choice(SPICE) + data[at + chance.randint(0, 1) :]
        accepted += compare(data)
    assert accepted > 500


@pytest.mark.parametrize("octet", range(256))
def test_what_may_stand_in_names_and_values(octet: int) -> None:
    """RFC 9110 sections 5.1 and 5.5, by both readers."""
    byte = bytes([octet])
    in_names = octet < 128 and (chr(octet).isalnum() or byte in b"!#$%&'*+-.^_`|~")
    in_values = octet not in b"\r\n" and (octet >= 32 or byte == b"\t") and octet != 127
    for line, allowed in ((b"X" + byte + b"Y: z", in_names), (b"X: y" + byte + b"z", in_values)):
        allowed = allowed or line == b"X:Y: z"
        fields = line + b"\r\nContent-Length: 0\r\n\r\n"
        assert (accept(b"GET / HTTP/1.1\r\nHost: h\r\n" + fields) is not None) == allowed
        reader = ResponseReader()
        reader.receive(b"HTTP/1.1 200 OK\r\n" + fields)
        if allowed:
            head = reader.read_head(b"GET")
            assert head is not None
            name, _, value = line.partition(b":")
            assert head.fields[0] == (name.lower(), name, value.strip(b" \t"))
        else:
            with pytest.raises(UpstreamError):
                reader.read_head(b"GET")


def reading_of_h11(change: Callable[[h11.Request], Any]) -> Callable[[h11.Connection], Any]:
    """Return a `next_event` that makes something else of what h11 has read."""
    read = h11.Connection.next_event

    def next_event(connection: h11.Connection) -> Any:
        request = read(connection)
        assert isinstance(request, h11.Request)
        return change(request)

    return next_event


def test_what_h11_reads_is_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    other = h11.Request(method="PUT", target="/other", headers=[("Host", "other"), ("X", "y")])
    monkeypatch.setattr(h11.Connection, "next_event", reading_of_h11(lambda _: other))
    accepted = accept(b"GET / HTTP/1.1\r\nHost: h\r\nA: b\r\n\r\n")
    assert accepted is not None
    head = accepted[0]
    assert (head.method, head.target, head.host) == (b"PUT", b"/other", b"other")
    assert head.fields == [(b"host", b"Host", b"other"), (b"x", b"X", b"y")]


@pytest.mark.parametrize("change", [lambda _: h11.NEED_DATA, lambda request: fewer(request)])
def test_a_request_that_h11_does_not_read_whole_goes_nowhere(
    change: Callable[[h11.Request], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = b"GET / HTTP/1.1\r\nHost: h\r\nX: y\r\n\r\n"
    assert accept(request) is not None
    monkeypatch.setattr(h11.Connection, "next_event", reading_of_h11(change))
    assert accept(request) is None


def fewer(request: h11.Request) -> h11.Request:
    """Return a request without its last field."""
    return h11.Request(method=request.method, target=request.target, headers=request.headers.raw_items()[:-1])


def test_a_response_that_llhttp_reads_otherwise_is_a_bad_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    class Misled(httptools.HttpResponseParser):
        def get_status_code(self) -> int:
            return 204

    class Deaf(httptools.HttpResponseParser):
        def __init__(self, protocol: object) -> None:
            super().__init__(object())

    def read() -> int:
        reader = ResponseReader()
        reader.receive(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        head = reader.read_head(b"GET")
        assert head is not None
        return head.status

    assert read() == 200
    for parser in (Misled, Deaf):
        monkeypatch.setattr(httptools, "HttpResponseParser", parser)
        with pytest.raises(UpstreamError, match="bad_head"):
            read()
