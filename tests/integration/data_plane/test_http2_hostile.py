"""Clients that mean harm, in HTTP/2: raw frames, as no library would send them (RFC 9113 sections 6, 8 and 10.5)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest
from hpack import Decoder, Encoder

from tests.backends import Backend, BackendConnection, always, answer_each, backend, ok
from tests.dataplane import DataPlane, TlsClient, big, data_plane, until
from tests.http2_client import CONTEXT, connect
from tests.unit.tls.peers import Client

HTTP2 = {"http2": True}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
NO_ERROR, PROTOCOL_ERROR, STREAM_CLOSED, REFUSED_STREAM, ENHANCE_YOUR_CALM = 0, 1, 5, 7, 11
GET = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")]
POST = [(b":method", b"POST"), *GET[1:]]


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """Return a frame (RFC 9113 section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def number(value: int) -> bytes:
    return value.to_bytes(4, "big")


class RawClient:
    """Sends what a test says, and keeps the frames that come back."""

    def __init__(self, tls: TlsClient) -> None:
        self.tls = tls
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.decoder.max_header_list_size = 1 << 20
        self.frames: list[tuple[int, int, int, bytes]] = []
        self.statuses: dict[int, int] = {}
        self.resets: dict[int, int] = {}
        self.bodies: dict[int, bytes] = {}
        self.ended: set[int] = set()
        self.goaway: int | None = None
        """Its error code."""
        self._received = b""

    async def send(self, *frames: bytes) -> None:
        """Send in as few TLS records as they go into; that the proxy has closed meanwhile is no error."""
        with contextlib.suppress(ConnectionError):
            await self.tls.send(b"".join(frames))

    def headers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]] = GET, flags: int = END_STREAM) -> bytes:
        """Return a HEADERS frame with a whole block."""
        return frame(HEADERS, flags | END_HEADERS, stream_id, self.encoder.encode(fields))

    async def step(self) -> bool:
        """Read something; False at the end."""
        if not self.tls.buffer and not await self.tls.more():
            return False
        self._received += self.tls.buffer
        self.tls.buffer = b""
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                break
            kind, flags = self._received[3], self._received[4]
            stream_id, payload = int.from_bytes(self._received[5:9], "big"), self._received[9:end]
            self._received = self._received[end:]
            self._take(kind, flags, stream_id, payload)
        return True

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        self.frames.append((kind, flags, stream_id, payload))
        if kind == HEADERS:
            fields = dict(self.decoder.decode(payload, raw=True))
            if b":status" in fields:
                self.statuses[stream_id] = int(fields[b":status"])
        elif kind == RST_STREAM:
            self.resets[stream_id] = int.from_bytes(payload, "big")
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == DATA:
            self.bodies[stream_id] = self.bodies.get(stream_id, b"") + payload
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            self.ended.add(stream_id)

    async def until_over(self, stream_id: int) -> int:
        """Read until a stream is answered or reset, or the connection has ended; return the status, or 0."""
        while stream_id not in self.ended and stream_id not in self.resets and await self.step():
            pass
        return self.statuses.get(stream_id, 0)

    async def until_end(self) -> int | None:
        """Read to the end; return the error code of the last GOAWAY."""
        while await self.step():
            pass
        return self.goaway

    async def ping(self) -> bool:
        """Tell whether the connection lives."""
        before = len([kind for kind, flags, _, _ in self.frames if kind == PING])
        await self.send(frame(PING, 0, 0, b"12345678"))
        while len([kind for kind, flags, _, _ in self.frames if kind == PING]) == before:
            if not await self.step():
                return False
        return True


async def raw_client(proxy: DataPlane, start: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> RawClient:
    """Return a client that has chosen HTTP/2 and sent no more than `start`."""
    tls = await proxy.open()
    tls.tls = Client(CONTEXT, "localhost")
    await tls.shake_hands()
    client = RawClient(tls)
    await client.send(start)
    return client


@pytest.fixture(autouse=True)
async def _no_callback_raises() -> AsyncIterator[None]:
    """An exception in a callback of the loop would be a traceback in the log, and a connection left to itself."""
    raised: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    yield
    assert raised == []


@contextlib.asynccontextmanager
async def serving(handler: Any = answer_each, **options: Any) -> AsyncIterator[tuple[DataPlane, Backend]]:
    """Run a proxy of HTTP/2 before a back end; whatever has been done to it, others must be served at its end."""
    async with backend(handler) as app, data_plane(app.port, listener=HTTP2, **options) as proxy:
        yield proxy, app
        await until(lambda: not proxy.counted("tlsproxy_handshakes_in_flight"))


def rejected(proxy: DataPlane) -> set[str]:
    return {labels[-1] for labels in proxy.counted("tlsproxy_http_rejected_total")}


async def hang(connection: BackendConnection) -> None:
    """Answer nothing, until the proxy closes."""
    while await connection.read():
        pass


# Requests that must not get to a server.

MALFORMED: dict[str, Sequence[tuple[bytes, bytes]]] = {
    "no method": GET[1:],
    "no scheme": [GET[0], *GET[2:]],
    "no path": GET[:3],
    "no authority": [*GET[:2], GET[3]],
    "empty method": [(b":method", b""), *GET[1:]],
    "empty path": [*GET[:3], (b":path", b"")],
    "empty authority": [*GET[:2], (b":authority", b""), GET[3]],
    "method twice": [GET[0], *GET],
    "path twice": [*GET, (b":path", b"/other")],
    "authority twice": [*GET, (b":authority", b"localhost")],
    "pseudo-header after fields": [*GET[:3], (b"a", b"b"), GET[3]],
    "unknown pseudo-header": [*GET, (b":x", b"y")],
    "status in a request": [*GET, (b":status", b"200")],
    "protocol without CONNECT": [*GET, (b":protocol", b"websocket")],
    "pseudo-header without a name": [*GET, (b":", b"y")],
    "odd scheme": [GET[0], (b":scheme", b"ftp"), *GET[2:]],
    "scheme with a line": [GET[0], (b":scheme", b"https://evil/\r\nx: y"), *GET[2:]],
    "method with space": [(b":method", b"GET /admin HTTP/1.1\r\nx: y\r\n"), *GET[1:]],
    "method that is no token": [(b":method", b"G(ET"), *GET[1:]],
    "path with space": [*GET[:3], (b":path", b"/ HTTP/1.1")],
    "path with lines": [*GET[:3], (b":path", b"/ HTTP/1.1\r\nHost: evil\r\n\r\nGET /admin")],
    "path with NUL": [*GET[:3], (b":path", b"/\0")],
    "path with fragment": [*GET[:3], (b":path", b"/a#b")],
    "path with 8 bits": [*GET[:3], (b":path", b"/\xff")],
    "path without slash": [*GET[:3], (b":path", b"admin")],
    "absolute path": [*GET[:3], (b":path", b"http://evil/")],
    "asterisk for GET": [*GET[:3], (b":path", b"*")],
    "path above the root": [*GET[:3], (b":path", b"/../etc")],
    "authority with user": [*GET[:2], (b":authority", b"user@localhost"), GET[3]],
    "authority with path": [*GET[:2], (b":authority", b"localhost/x"), GET[3]],
    "authority with line": [*GET[:2], (b":authority", b"localhost\r\nx: y"), GET[3]],
    "authority with comma": [*GET[:2], (b":authority", b"localhost,evil"), GET[3]],
    "host that differs": [*GET, (b"host", b"evil")],
    "host twice": [*GET, (b"host", b"localhost"), (b"host", b"localhost")],
    "hosts alone": [*GET[:2], GET[3], (b"host", b"localhost"), (b"host", b"evil")],
    "transfer-encoding": [*GET, (b"transfer-encoding", b"chunked")],
    "connection": [*GET, (b"connection", b"x-forwarded-for")],
    "keep-alive": [*GET, (b"keep-alive", b"1")],
    "proxy-connection": [*GET, (b"proxy-connection", b"close")],
    "upgrade": [*GET, (b"upgrade", b"websocket")],
    "te": [*GET, (b"te", b"gzip")],
    "two te": [*GET, (b"te", b"trailers"), (b"te", b"chunked")],
    "upper case": [*GET, (b"X-A", b"b")],
    "empty name": [*GET, (b"", b"b")],
    "name with space": [*GET, (b"a b", b"c")],
    "name with space at its end": [*GET, (b"transfer-encoding ", b"chunked")],
    "name with colon": [*GET, (b"a:b", b"c")],
    "name with line": [*GET, (b"a\r\nb", b"c")],
    "name with NUL": [*GET, (b"a\0", b"c")],
    "name with 8 bits": [*GET, (b"a\xe4", b"c")],
    "name with DEL": [*GET, (b"a\x7f", b"c")],
    "name that is no token": [*GET, (b"a(b)", b"c")],
    "value with CR LF": [*GET, (b"a", b"b\r\ntransfer-encoding: chunked")],
    "value with LF": [*GET, (b"a", b"b\nc: d")],
    "value with CR": [*GET, (b"a", b"b\rc")],
    "value with NUL": [*GET, (b"a", b"b\0")],
    "value with control character": [*GET, (b"a", b"b\x1bc")],
    "value with space before": [*GET, (b"a", b" b")],
    "value with tab after": [*GET, (b"a", b"b\t")],
    "two content-lengths": [*POST, (b"content-length", b"1"), (b"content-length", b"2")],
    "two equal content-lengths": [*POST, (b"content-length", b"0"), (b"content-length", b"0")],
    "content-length with comma": [*POST, (b"content-length", b"0, 0")],
    "content-length with sign": [*POST, (b"content-length", b"+0")],
    "content-length with underscore": [*POST, (b"content-length", b"0_0")],
    "content-length in hex": [*POST, (b"content-length", b"0x0")],
    "content-length that is empty": [*POST, (b"content-length", b"")],
    "content-length of 5000 digits": [*POST, (b"content-length", b"0" * 5000)],
    "content-length without a body": [*POST, (b"content-length", b"5")],
    "CONNECT": [(b":method", b"CONNECT"), (b":authority", b"localhost:22")],
    "extended CONNECT": [(b":method", b"CONNECT"), *GET[1:], (b":protocol", b"websocket")],
    "CONNECT with path": [(b":method", b"CONNECT"), *GET[1:]],
    "TRACE": [(b":method", b"TRACE"), *GET[1:]],
    "too many fields": [*GET, *[(b"a", b"b")] * 200],
    "nothing": [],
}


@pytest.mark.parametrize("fields", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_request_reaches_no_server(fields: Sequence[tuple[bytes, bytes]]) -> None:
    async with serving() as (proxy, app):
        client = await raw_client(proxy)
        await client.send(client.headers(1, fields))
        status = await client.until_over(1)
        assert 400 <= status < 502 or client.resets.get(1) == PROTOCOL_ERROR or client.goaway, client.frames
        assert app.connections == []
        if not client.goaway:
            await client.send(client.headers(3))
            assert await client.until_over(3) == 200


TRAILERS = frame(HEADERS, END_STREAM | END_HEADERS, 1, Encoder().encode([(b"x-sum", b"1")]))
WRONG_ENDINGS = [
    [],
    [frame(DATA, END_STREAM, 1, b"12345")],
    [frame(DATA, 0, 1, b"12345"), TRAILERS],
    [frame(DATA, END_STREAM, 1, b"x" * 11)],
    [TRAILERS],
]


async def test_a_body_that_is_not_as_long_as_it_says_never_desynchronises_a_server() -> None:
    """The server answers before it has read the body; what is missing of it would be taken from the next request."""
    head = [*POST, (b"content-length", b"10")]
    async with serving(always(ok())) as (proxy, app):
        for case in range(5):
            client = await raw_client(proxy)
            await client.send(client.headers(1, head, 0 if case else END_STREAM), *WRONG_ENDINGS[case])
            await client.until_over(1)
            client.tls.vanish()
            other = await connect(proxy)
            assert (await other.get("/innocent")).status == 200
            other.tls.vanish()
    for connection in app.connections:
        heads = bytes(connection.received).split(b"\r\n\r\n")[:-1]
        assert {head.partition(b"\r\n")[0] for head in heads} <= {b"POST / HTTP/1.1", b"GET /innocent HTTP/1.1"}


async def test_the_framing_of_a_request_without_length_is_the_proxys_own() -> None:
    async def read_chunks(connection: BackendConnection) -> None:
        await connection.head()
        while not connection.received.endswith(b"0\r\n\r\n"):
            assert await connection.read()
        await connection.send(ok())

    async with serving(read_chunks) as (proxy, app):
        client = await raw_client(proxy)
        smuggled = b"0\r\n\r\nGET /admin HTTP/1.1\r\nHost: localhost\r\n\r\n"
        await client.send(client.headers(1, POST, 0), frame(DATA, END_STREAM, 1, smuggled))
        assert await client.until_over(1) == 200
        assert app.received.endswith(b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled))


async def test_cookies_that_came_apart_go_on_as_one() -> None:
    async with serving() as (proxy, app):
        client = await raw_client(proxy)
        await client.send(client.headers(1, [*GET, (b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")]))
        assert await client.until_over(1) == 200
        assert app.received.count(b"ookie: ") == 1
        assert b"a=1; b=2\r\n" in app.received


# Frames that break the protocol.

BROKEN: dict[str, bytes] = {
    "DATA on no stream": frame(DATA, 0, 0, b"x"),
    "DATA on an idle stream": frame(DATA, 0, 9, b"x"),
    "HEADERS on no stream": frame(HEADERS, 5, 0, b"\x82\x87\x84"),
    "HEADERS of an even stream": frame(HEADERS, 5, 2, b"\x82\x87\x84\x41\x01a"),
    "HEADERS that depend on themselves": frame(HEADERS, 0x25, 1, number(1) + b"\x10\x82\x87\x84\x41\x01a"),
    "HEADERS padded beyond their end": frame(HEADERS, 13, 1, b"\xff\x82\x87"),
    "DATA padded beyond its end": frame(DATA, 8, 1, b"\xffx"),
    "HEADERS that no table can decode": frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff"),
    "index 0": frame(HEADERS, 5, 1, b"\x80"),
    "index of nothing": frame(HEADERS, 5, 1, b"\xbf"),
    "endless integer": frame(HEADERS, 5, 1, b"\x7f" + b"\xff" * 1000),
    "string beyond its end": frame(HEADERS, 5, 1, b"\x40\x7f\x00a"),
    "Huffman code of EOS": frame(HEADERS, 5, 1, b"\x40\x84\xff\xff\xff\xff\x01a"),
    "table larger than allowed": frame(HEADERS, 5, 1, b"\x3f\xff\xff\x03"),
    "PRIORITY on no stream": frame(PRIORITY, 0, 0, number(1) + b"\0"),
    "PRIORITY too short": frame(PRIORITY, 0, 1, b"\0"),
    "PRIORITY on itself": frame(PRIORITY, 0, 1, number(1) + b"\0"),
    "RST_STREAM on no stream": frame(RST_STREAM, 0, 0, number(8)),
    "RST_STREAM too short": frame(RST_STREAM, 0, 1, b"\0"),
    "SETTINGS on a stream": frame(SETTINGS, 0, 1),
    "SETTINGS of 5 bytes": frame(SETTINGS, 0, 0, b"\0" * 5),
    "SETTINGS acknowledged with content": frame(SETTINGS, 1, 0, b"\0\3" + number(1)),
    "window too large by SETTINGS": frame(SETTINGS, 0, 0, b"\0\4" + number(1 << 31)),
    "frame size too small by SETTINGS": frame(SETTINGS, 0, 0, b"\0\5" + number(1)),
    "push of 2 by SETTINGS": frame(SETTINGS, 0, 0, b"\0\2" + number(2)),
    "PUSH_PROMISE": frame(PUSH_PROMISE, 4, 1, number(2) + b"\x82"),
    "PING on a stream": frame(PING, 0, 1, b"12345678"),
    "PING of 7 bytes": frame(PING, 0, 0, b"1234567"),
    "WINDOW_UPDATE of 0": frame(WINDOW_UPDATE, 0, 0, number(0)),
    "WINDOW_UPDATE beyond the largest": frame(WINDOW_UPDATE, 0, 0, number((1 << 31) - 1)),
    "WINDOW_UPDATE on an idle stream": frame(WINDOW_UPDATE, 0, 9, number(1)),
    "WINDOW_UPDATE too short": frame(WINDOW_UPDATE, 0, 0, b"\0"),
    "CONTINUATION of nothing": frame(CONTINUATION, 4, 1, b"\x82"),
    "CONTINUATION of another": frame(HEADERS, 1, 1, b"\x82") + frame(CONTINUATION, 4, 3, b"\x87"),
    "another frame amid a head": frame(HEADERS, 1, 1, b"\x82") + frame(PING, 0, 0, b"12345678"),
    "16 MB announced": b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "16,385 bytes announced": b"\x00\x40\x01\x00\x00\x00\x00\x00\x01",
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_a_frame_that_breaks_the_protocol_ends_the_connection_and_all_it_had(broken: bytes) -> None:
    async with serving(hang) as (proxy, app):
        client = await raw_client(proxy, PREFACE + frame(SETTINGS, 0, 0))
        await client.send(client.headers(7, POST, 0), broken)
        assert await client.until_end(), client.frames
        assert client.tls.end == "close_notify"
        for connection in app.connections:
            await connection.ended.wait()


NO_PREFACE = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "nearly the preface": PREFACE[:-1] + b"x",
    "no SETTINGS": PREFACE + frame(PING, 0, 0, b"12345678"),
    "a frame": frame(SETTINGS, 0, 0) * 3,
}


@pytest.mark.parametrize("start", NO_PREFACE.values(), ids=NO_PREFACE)
async def test_what_is_no_preface_is_refused(start: bytes) -> None:
    async with serving() as (proxy, _):
        client = await raw_client(proxy, start)
        if start.startswith(PREFACE):
            # Nothing is at stake: the proxy goes by the initial settings then.
            assert await client.ping()
        else:
            await client.until_end()
            assert (client.tls.end, rejected(proxy)) == ("close_notify", {"http2_protocol_error"})


async def test_streams_out_of_order_end_the_connection() -> None:
    async with serving(hang) as (proxy, _):
        client = await raw_client(proxy)
        await client.send(client.headers(5), client.headers(3))
        assert await client.until_end() == PROTOCOL_ERROR


@pytest.mark.parametrize("kind", [HEADERS, DATA])
async def test_what_comes_after_a_requests_end_resets_it(kind: int) -> None:
    async with serving(hang) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(client.headers(1))
        await until(lambda: app.connections)
        again = client.headers(1) if kind == HEADERS else frame(DATA, 0, 1, b"x")
        await client.send(again)
        await client.until_over(1)
        assert client.resets == {1: STREAM_CLOSED}
        await app.connections[0].ended.wait()
        assert await client.ping()


async def test_requests_after_goodbye_are_still_answered_or_refused() -> None:
    async with serving() as (proxy, _):
        client = await raw_client(proxy)
        await client.send(frame(GOAWAY, 0, 0, bytes(8)), client.headers(1))
        await client.until_end()
        assert client.statuses.get(1, 200) == 200


# Floods, and what is asked again and again.

FLOODS: dict[str, bytes] = {
    "PING": frame(PING, 0, 0, b"12345678"),
    "PING acknowledged": frame(PING, 1, 0, b"12345678"),
    "SETTINGS": frame(SETTINGS, 0, 0),
    "SETTINGS acknowledged": frame(SETTINGS, 1, 0),
    "PRIORITY": frame(PRIORITY, 0, 3, bytes(5)),
    "unknown frames": frame(0x77, 0, 0, b"x"),
    "empty DATA": frame(DATA, 0, 1),
    "padding alone": frame(DATA, PADDED, 1, b"\x0f" + bytes(15)),
    "RST_STREAM": frame(RST_STREAM, 0, 1, number(8)),
    "GOAWAY": frame(GOAWAY, 0, 0, bytes(8)),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_floods_of_frames_that_mean_nothing_are_cut_off(flood: bytes) -> None:
    async with serving(hang) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(client.headers(1, POST, 0), flood * 3000)
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert rejected(proxy) == {"http2_flood"}
        for connection in app.connections:
            await connection.ended.wait()


@pytest.mark.parametrize("spread", [False, True], ids=["at once", "one by one"])
async def test_rapid_reset_is_cut_off(spread: bool) -> None:
    """CVE-2023-44487."""
    async with serving(hang) as (proxy, app):
        client = await raw_client(proxy)
        pieces = [client.headers(n) + frame(RST_STREAM, 0, n, number(8)) for n in range(1, 2001, 2)]
        if spread:
            for piece in pieces:
                await client.send(piece)
                await asyncio.sleep(0)
        else:
            await client.send(*pieces)
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert sum(proxy.counted("tlsproxy_http_requests_total").values()) <= 300
        assert len(app.connections) <= 300


async def test_resets_that_the_server_is_made_to_send_count_as_the_clients() -> None:
    """CVE-2025-8671: a window beyond the largest makes the proxy reset the stream itself."""
    async with serving(hang) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(
            *(client.headers(n) + frame(WINDOW_UPDATE, 0, n, number((1 << 31) - 1)) for n in range(1, 4001, 2))
        )
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert sum(proxy.counted("tlsproxy_http_requests_total").values()) <= 300
        assert len(app.connections) <= 300


async def test_more_streams_than_allowed_are_refused_one_by_one() -> None:
    """A client does not know the limit yet when it sends its first requests (RFC 9113 section 5.1.2)."""
    async with serving(hang, limits={"streams": 10}) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(*(client.headers(n) for n in range(1, 41, 2)))
        await until(lambda: len(app.connections) == 10)
        assert await client.ping()
        assert client.resets == dict.fromkeys(range(21, 41, 2), REFUSED_STREAM)


async def test_streams_refused_again_and_again_are_cut_off() -> None:
    async with serving(hang, limits={"streams": 10}) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(*(client.headers(n) for n in range(1, 4001, 2)))
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert len(app.connections) <= 10


async def test_a_head_of_many_continuations_is_cut_off_before_it_is_held() -> None:
    """CVE-2024-27316 and its kind."""
    async with serving(limits={"header_bytes": 16384}) as (proxy, _):
        client = await raw_client(proxy)
        await client.send(frame(HEADERS, END_STREAM, 1, bytes(16384)), *[frame(CONTINUATION, 0, 1, bytes(16384))] * 2)
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert rejected(proxy) == {"header_too_large"}


async def test_empty_continuations_are_cut_off() -> None:
    async with serving() as (proxy, _):
        client = await raw_client(proxy)
        await client.send(frame(HEADERS, END_STREAM, 1), frame(CONTINUATION, 0, 1) * 3000)
        assert await client.until_end() in (ENHANCE_YOUR_CALM, PROTOCOL_ERROR)


async def test_a_head_too_large_is_answered_and_the_connection_goes_on() -> None:
    async with serving(limits={"header_bytes": 16384}) as (proxy, _):
        client = await raw_client(proxy)
        block = client.encoder.encode([*GET, (b"x-big", b"x" * 17_000)], huffman=False)
        await client.send(
            frame(HEADERS, END_STREAM, 1, block[:10_000]), frame(CONTINUATION, END_HEADERS, 1, block[10_000:])
        )
        assert await client.until_over(1) == 431
        await client.send(client.headers(3))
        assert await client.until_over(3) == 200
        assert rejected(proxy) == {"header_too_large"}


async def test_a_compression_bomb_is_refused() -> None:
    async with serving() as (proxy, _):
        client = await raw_client(proxy)
        await client.send(client.headers(1, [*GET, (b"x-bomb", b"x" * 4000)]))
        assert await client.until_over(1) == 200
        await client.send(frame(HEADERS, END_STREAM | END_HEADERS, 3, client.encoder.encode(GET) + b"\xbe" * 16_000))
        assert await client.until_end() == ENHANCE_YOUR_CALM
        assert rejected(proxy) == {"header_too_large"}


# What a client makes the proxy hold.


async def test_settings_that_nobody_knows_are_not_kept() -> None:
    async with serving() as (proxy, _):
        client = await raw_client(proxy)
        payload = b"".join((256 + n).to_bytes(2, "big") + number(1) for n in range(2700))
        await client.send(frame(SETTINGS, 0, 0, payload))
        assert await client.ping()
        (connection,) = proxy.runtime._open
        settings = connection._successor.protocol._h2.remote_settings  # type: ignore[attr-defined]
        assert len(settings) < 10


async def test_the_table_for_heads_sent_is_as_large_as_the_proxy_wants() -> None:
    """It is searched field by field: at the size that a client may ask for, one connection takes seconds of a CPU."""

    async def different(connection: BackendConnection) -> None:
        count = 0
        while await connection.head():
            count += 1
            await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Id: %b%d\r\n\r\n" % (b"x" * 1000, count))

    async with serving(different) as (proxy, _):
        client = await raw_client(proxy, PREFACE + frame(SETTINGS, 0, 0, b"\0\1" + number((1 << 32) - 1)))
        client.decoder.max_allowed_table_size = 1 << 32
        for n in range(1, 101, 2):
            await client.send(client.headers(n))
            assert await client.until_over(n) == 200
        assert client.decoder.header_table._current_size <= 4096


async def test_a_client_that_reads_nothing_is_cut_off_with_all_its_streams() -> None:
    async with serving(always(ok(big(300_000))), timeouts={"body_idle_s": 0.3}) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(*(client.headers(n) for n in range(1, 201, 2)))
        await until(lambda: len(app.connections) == 100)
        await asyncio.sleep(0.5)
        proxy.sweep()
        await until(lambda: not proxy.counted("tlsproxy_upstream_connections").get(("app", "active")))


async def test_windows_opened_by_a_byte_cost_no_more_than_a_byte() -> None:
    """One WINDOW_UPDATE of the connection must not be an occasion to look at every stream."""
    async with serving(always(ok(big(100_000)))) as (proxy, app):
        client = await raw_client(proxy)
        await client.send(*(client.headers(n) for n in range(1, 201, 2)))
        await until(lambda: len(app.connections) == 100)
        while sum(map(len, client.bodies.values())) < 65_535:
            assert await client.step()
        (connection,) = proxy.runtime._open
        session = connection._successor  # type: ignore[attr-defined]
        await until(lambda: len(session._blocked) == 100)
        pumped = 0
        pump = type(session).pump

        def counting(self: Any, stream: Any) -> None:
            nonlocal pumped
            pumped += 1
            pump(self, stream)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(session), "pump", counting)
            await client.send(frame(WINDOW_UPDATE, 0, 0, number(1)) * 100)
            while sum(map(len, client.bodies.values())) < 65_635:
                assert await client.step()
        assert pumped < 300
        client.tls.vanish()


# What is never finished.


@pytest.mark.parametrize(
    "start", [b"", PREFACE[:10], PREFACE, PREFACE + frame(SETTINGS, 0, 0)], ids=["nothing", "half", "preface", "idle"]
)
async def test_a_beginning_without_end_is_closed(start: bytes) -> None:
    async with serving(timeouts={"header_s": 0.2, "idle_s": 0.2}) as (proxy, _):
        client = await raw_client(proxy, start)
        await asyncio.sleep(0.25)
        proxy.sweep()
        await client.until_end()
        assert client.tls.end == "close_notify"


@pytest.mark.parametrize("kind", ["frame", "continuation"])
async def test_a_head_that_trickles_keeps_nothing_open(kind: str) -> None:
    async with serving(timeouts={"header_s": 0.4, "idle_s": 0.4}) as (proxy, _):
        client = await raw_client(proxy)
        await client.send(client.headers(1))
        assert await client.until_over(1) == 200
        await client.send(frame(HEADERS, END_STREAM, 3, b"\x82")[: -1 if kind == "frame" else None])
        for _ in range(10):
            await asyncio.sleep(0.06)
            if kind == "continuation":
                await client.send(frame(CONTINUATION, 0, 3, b"\x87"))
            proxy.sweep()
        await client.until_end()
        assert client.tls.end == "close_notify"


async def test_frames_that_wait_for_their_turn_survive_close_notify() -> None:
    async with serving(routes=[{"host": "elsewhere"}]) as (proxy, _):
        client = await raw_client(proxy)
        frames = b"".join(client.headers(n) for n in range(1, 161, 2))
        client.tls.writer.write(client.tls.tls.send(frames) + client.tls.tls.close())
        await client.until_end()
        assert len(proxy.counted("tlsproxy_http_requests_total")) == 1
        assert sum(proxy.counted("tlsproxy_http_requests_total").values()) == 80


# Anything at all.


def conversations(seed: int) -> Iterator[bytes]:
    """Yield what a client might send, sound and then spoilt: bytes flipped, frames cut, doubled or in another order."""
    chance = random.Random(seed)
    for _ in range(60):
        encoder = Encoder()
        frames = [PREFACE + frame(SETTINGS, 0, 0, b"\0\4" + number(chance.choice((0, 10, 65_535, 1 << 20))))]
        for n in range(1, 2 * chance.randrange(2, 8), 2):
            head = chance.choice((GET, POST, [*POST, (b"content-length", b"20")], [*GET, (b"te", b"trailers")]))
            ended = END_STREAM if head[0] == GET[0] else 0
            block = encoder.encode(head, huffman=chance.random() < 0.5)
            if chance.random() < 0.2:
                frames += [frame(HEADERS, ended, n, block[:5]), frame(CONTINUATION, END_HEADERS, n, block[5:])]
            else:
                frames.append(frame(HEADERS, ended | END_HEADERS, n, block))
            if not ended:
                frames += [frame(DATA, 0, n, b"0123456789"), frame(DATA, END_STREAM, n, b"0123456789")]
            frames.append(
                chance.choice(
                    (
                        frame(WINDOW_UPDATE, 0, n, number(chance.choice((1, 1000, (1 << 31) - 1)))),
                        frame(WINDOW_UPDATE, 0, 0, number(chance.choice((1, 1000)))),
                        frame(RST_STREAM, 0, n, number(8)),
                        frame(PING, 0, 0, b"12345678"),
                        frame(PRIORITY, 0, n, number(0) + b"\x10"),
                        frame(SETTINGS, 0, 0, b"\0\4" + number(chance.randrange(100))),
                        frame(SETTINGS, 0, 0, b"\0\1" + number(chance.choice((0, 4096, (1 << 32) - 1)))),
                        frame(SETTINGS, 1, 0),
                        frame(GOAWAY, 0, 0, bytes(8)),
                    )
                )
            )
        for _ in range(chance.randrange(3)):
            spoilt = chance.randrange(1, len(frames))
            match chance.randrange(5):
                case 0:
                    frames.insert(spoilt, frames[spoilt])
                case 1:
                    frames.insert(spoilt, frames.pop(chance.randrange(1, len(frames))))
                case 2:
                    frames[spoilt] = frames[spoilt][: chance.randrange(len(frames[spoilt]) + 1)]
                case _:
                    changed = bytearray(frames[spoilt] or b"\0")
                    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
                    frames[spoilt] = bytes(changed)
        yield b"".join(frames)


async def anything(connection: BackendConnection) -> None:
    """Answer each request at once, with more than some windows take, and read what comes after."""
    while await connection.head():
        await connection.send(ok(bytes(2000)))


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_sent_leaves_nothing_behind(seed: int) -> None:
    async with serving(anything, timeouts={"body_idle_s": 0.05}) as (proxy, _):
        for sent in conversations(seed):
            client = await raw_client(proxy, b"")
            cut = len(sent) // 2 if len(sent) % 3 == 0 else len(sent)
            await client.send(sent[:cut])
            await asyncio.sleep(0)
            await client.send(sent[cut:])
            if len(sent) % 2:
                client.tls.send_close_notify()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(client.step(), 0.2)
            client.tls.vanish()

        def gone() -> bool:
            # A window that close_notify has left shut is waited for no longer than any other.
            proxy.sweep()
            return proxy.runtime.connections == 0

        await until(gone)
        await until(lambda: not proxy.counted("tlsproxy_upstream_connections").get(("app", "active")))
        assert (await (await connect(proxy)).get()).status == 200
