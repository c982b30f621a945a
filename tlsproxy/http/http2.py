"""One HTTP/2 connection as its server sees it (RFC 9113): bytes in, events out. The protocol is the h2 library's.

Before h2 stands what it leaves to its owner: frames go in one by one, so that one turn of the loop takes a bounded
number of them; a frame that is too large is refused by its length, not after all of it has been held; and frames that
cost much and bring nothing forward are on a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from h2 import events as h2_events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import GoAwayFrame

STREAM_WINDOW_BYTES = 256 * 1024
"""What a client may send of one request's body before the server behind has taken it."""
CONNECTION_WINDOW_BYTES = 1024 * 1024
"""The same for all requests of a connection together, and so what the proxy may come to hold for them."""

_PREFACE_BYTES = 24
_FRAME_HEAD_BYTES = 9
_MAX_FRAME_BYTES = 1 << 14
"""SETTINGS_MAX_FRAME_SIZE, of which we leave the initial value (RFC 9113 section 6.5.2)."""
_DEFAULT_WINDOW_BYTES = (1 << 16) - 1
_LAST_STREAM_ID = (1 << 31) - 1

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 7, 8, 9
_END_STREAM, _PADDED = 1, 8
_SETTING_BYTES = 6
_KNOWN_SETTINGS = frozenset(map(int, SettingCodes))
_TABLE_BYTES = 4096
"""What heads are compressed against, however much a client offers: hpack searches all of it for each field."""
_BUDGET = 1000.0
_BUDGET_PER_S = 50.0
_RESET_COST = 5.0
"""A request taken back at once has cost us a connection to a server."""
_HEAD_SLACK = 2
"""A head so many times as large as allowed is still read, if only to be answered: what follows refers back to it."""


class Http2Error(Exception):
    """The client broke the protocol or its budget: the connection ends. `rule` is a metric label, from a fixed set."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


class HeadersReceived(NamedTuple):
    """A request begins."""

    stream_id: int
    fields: list[tuple[bytes, bytes]]
    """With the pseudo-header fields; nothing about them is checked."""
    ended: bool
    """There is no body."""


class DataReceived(NamedTuple):
    """A part of a request's body, perhaps empty."""

    stream_id: int
    data: bytes
    window_bytes: int
    """What it takes of the windows, padding included: to be given back by `consumed`."""
    ended: bool


class TrailersReceived(NamedTuple):
    """The end of a request's body, with trailer fields."""

    stream_id: int
    fields: list[tuple[bytes, bytes]]


class StreamReset(NamedTuple):
    """The client wants no response any more."""

    stream_id: int


class WindowOpened(NamedTuple):
    """The client takes more on this stream, perhaps; 0: on those that the connection's window held up."""

    stream_id: int


Event = HeadersReceived | DataReceived | TrailersReceived | StreamReset | WindowOpened


class Http2Connection:
    """The server's side of one connection. `header_bytes` limits a request's head, `streams` the requests at a time."""

    __slots__ = (
        "_budget",
        "_budget_since_s",
        "_buffer",
        "_h2",
        "_head_bytes",
        "_max_head_bytes",
        "_preface_read",
        "_streams",
        "client_leaves",
    )

    def __init__(self, *, header_bytes: int, streams: int) -> None:
        h2 = H2Connection(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                # Heads are ours or read by our own rules; h2 would look at each byte of them, in Python. Of a client's
                # one byte can stand for kilobytes.
                validate_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        h2.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: streams,
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
                SettingCodes.MAX_HEADER_LIST_SIZE: header_bytes,
            },
        )
        self._max_head_bytes = h2.decoder.max_header_list_size = _HEAD_SLACK * header_bytes
        self._head_bytes = 0
        """Of the head that is being received, as it comes."""
        h2.initiate_connection()
        # The client has been told, but may not have read it yet: h2 would end the connection at a stream too many.
        h2.local_settings.max_concurrent_streams = _LAST_STREAM_ID
        h2.local_settings.acknowledge()
        self._streams = streams
        h2.increment_flow_control_window(CONNECTION_WINDOW_BYTES - _DEFAULT_WINDOW_BYTES)
        self._h2 = h2
        self._buffer = b""
        self._preface_read = False
        self._budget = _BUDGET
        self._budget_since_s = 0.0
        self.client_leaves = False
        """The client will begin no further request (GOAWAY)."""

    # In.

    def receive(self, data: bytes) -> None:
        """Take bytes from the client."""
        self._buffer = self._buffer + data if self._buffer else data

    def next_events(self, now_s: float) -> list[Event] | None:
        """Read the next frame and return what it means, or None while it is incomplete.

        Raises Http2Error. What is then to be sent ends with a GOAWAY that says why.
        """
        buffer = self._buffer
        if not self._preface_read:
            if len(buffer) < _PREFACE_BYTES:
                return None
            self._buffer = buffer[_PREFACE_BYTES:]
            self._preface_read = True
            return self._feed(buffer[:_PREFACE_BYTES], now_s)
        if len(buffer) < _FRAME_HEAD_BYTES:
            return None
        length = int.from_bytes(buffer[:3], "big")
        if length > _MAX_FRAME_BYTES:
            raise self._refusal(ErrorCodes.FRAME_SIZE_ERROR, "http2_frame_too_large")
        end = _FRAME_HEAD_BYTES + length
        if len(buffer) < end:
            return None
        frame, self._buffer = buffer[:end], buffer[end:]
        self._check(frame, now_s)
        kind = frame[3]
        if kind == _GOAWAY:
            # h2 would let go of the streams that are open, which the client still waits for.
            self.client_leaves = True
            return []
        return self._feed(_heeded(frame) if kind == _SETTINGS else frame, now_s)

    def _check(self, frame: bytes, now_s: float) -> None:
        """Limit what a head may take before it is read, and take off the budget what brings no request forward.

        Floods of such frames, HEADERS with RST_STREAM among them, have brought servers down at the cost of a few bytes
        each (CVE-2019-9512 to 9518, CVE-2023-44487, CVE-2024-27316). Raises Http2Error.
        """
        kind, flags, length = frame[3], frame[4], len(frame) - _FRAME_HEAD_BYTES
        if kind in (_HEADERS, _CONTINUATION):
            # h2 would hold 64 frames of it.
            self._head_bytes = length + (self._head_bytes if kind == _CONTINUATION else 0)
            if self._head_bytes > self._max_head_bytes:
                raise self._refusal(ErrorCodes.ENHANCE_YOUR_CALM, "header_too_large")
        if kind in (_HEADERS, _WINDOW_UPDATE):
            return
        if kind == _DATA:
            padding = 1 + frame[_FRAME_HEAD_BYTES] if length and flags & _PADDED else 0
            if length > padding or flags & _END_STREAM:
                return
        self._charge(_RESET_COST if kind == _RST_STREAM else 1.0, now_s)

    def _charge(self, cost: float, now_s: float) -> None:
        self._budget = min(_BUDGET, self._budget + (now_s - self._budget_since_s) * _BUDGET_PER_S)
        self._budget_since_s = now_s
        self._budget -= cost
        if self._budget < 0:
            raise self._refusal(ErrorCodes.ENHANCE_YOUR_CALM, "http2_flood")

    def _refusal(self, code: ErrorCodes, rule: str) -> Http2Error:
        self._h2.close_connection(code)
        return Http2Error(rule)

    def _feed(self, data: bytes, now_s: float) -> list[Event]:
        try:
            found = self._h2.receive_data(data)
        except ProtocolError as error:
            flood = error.error_code == ErrorCodes.ENHANCE_YOUR_CALM
            raise Http2Error("header_too_large" if flood else "http2_protocol_error") from None
        events: list[Event] = []
        for event in found:
            if isinstance(event, h2_events.DataReceived):
                ended = event.stream_ended is not None
                events.append(DataReceived(event.stream_id, event.data, event.flow_controlled_length, ended))
            elif isinstance(event, h2_events.RequestReceived):
                if self._h2.open_inbound_streams > self._streams:
                    self._h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
                    self._charge(_RESET_COST, now_s)
                else:
                    ended = event.stream_ended is not None
                    events.append(HeadersReceived(event.stream_id, _pairs(event.headers), ended))
            elif isinstance(event, h2_events.TrailersReceived):
                events.append(TrailersReceived(event.stream_id, _pairs(event.headers)))
            elif isinstance(event, h2_events.StreamReset):
                if not event.remote_reset:
                    # h2 has answered a broken frame so: it costs us the same (CVE-2025-8671).
                    self._charge(_RESET_COST, now_s)
                events.append(StreamReset(event.stream_id))
            elif isinstance(event, h2_events.WindowUpdated):
                events.append(WindowOpened(event.stream_id))
            elif isinstance(event, h2_events.RemoteSettingsChanged):
                # They may change the window of every stream, but not the connection's.
                events += [WindowOpened(stream_id) for stream_id in self._h2.streams]
        return events

    def consumed(self, stream_id: int, window_bytes: int) -> None:
        """Let the client send as much again: the server behind has taken it."""
        if window_bytes:
            self._h2.acknowledge_received_data(window_bytes, stream_id)

    # Out. A stream that is named here is open on our side.

    def send_headers(self, stream_id: int, fields: Sequence[tuple[bytes, bytes]], *, ended: bool) -> None:
        """Send the head of a response, or its trailers (`ended`)."""
        self._h2.send_headers(stream_id, fields, end_stream=ended)

    @property
    def has_room(self) -> bool:
        """The client takes more on the connection, if not on every stream."""
        return self._h2.outbound_flow_control_window > 0

    def room(self, stream_id: int) -> int:
        """Return how many bytes of a body the next send_data may have."""
        return min(self._h2.local_flow_control_window(stream_id), self._h2.max_outbound_frame_size)

    def send_data(self, stream_id: int, data: bytes | memoryview, *, ended: bool) -> None:
        """Send a part of a response's body, at most what there is `room` for."""
        self._h2.send_data(stream_id, data, end_stream=ended)

    def reset(self, stream_id: int, code: ErrorCodes) -> None:
        """End a stream, or take the rest of its request as unneeded (NO_ERROR after a whole response)."""
        self._h2.reset_stream(stream_id, code)

    def data_to_send(self) -> bytes:
        """Return the bytes for the client, once."""
        return self._h2.data_to_send()

    def announce_end(self) -> bytes:
        """Return a GOAWAY that asks for no further requests and refuses none yet (RFC 9113 section 6.8)."""
        return GoAwayFrame(0, last_stream_id=_LAST_STREAM_ID, error_code=ErrorCodes.NO_ERROR).serialize()

    def close(self) -> None:
        """Say that this is the end, and up to which request the client has been served."""
        self._h2.close_connection(ErrorCodes.NO_ERROR)


def _heeded(frame: bytes) -> bytes:
    """Return a SETTINGS frame with what there is to heed in it.

    h2 would keep every setting that it does not know, in 65,536 queues, and let the client say how large our table is.
    """
    if (len(frame) - _FRAME_HEAD_BYTES) % _SETTING_BYTES:
        return frame
    settings = bytearray()
    for start in range(_FRAME_HEAD_BYTES, len(frame), _SETTING_BYTES):
        code, value = int.from_bytes(frame[start : start + 2], "big"), frame[start + 2 : start + _SETTING_BYTES]
        if code == SettingCodes.HEADER_TABLE_SIZE:
            value = min(value, _TABLE_BYTES.to_bytes(4, "big"))
        if code in _KNOWN_SETTINGS:
            settings += frame[start : start + 2] + value
    return len(settings).to_bytes(3, "big") + frame[3:_FRAME_HEAD_BYTES] + settings


def _pairs(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in headers]
