"""HTTP/2 on a client connection: in HTTP/1.1's place once ALPN has chosen it. Many requests at once, each a stream.

Frames are taken in turns, so that no client's frames hold up other connections; what the streams have to say leaves as
far as the client's windows and transport have room.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes

from tlsproxy.http.http2 import (
    DataReceived,
    Event,
    HeadersReceived,
    Http2Connection,
    Http2Error,
    StreamReset,
    TrailersReceived,
    WindowOpened,
)
from tlsproxy.serve.client import DRAIN_IDLE_S, PauseReason, Phase
from tlsproxy.serve.http2_stream import Http2Stream

if TYPE_CHECKING:
    from tlsproxy.serve.handshake import HandshakeSummary
    from tlsproxy.serve.http_connection import HttpConnection

FRAMES_PER_TURN = 32
"""Frames of one client that are acted on before other connections get their turn."""
TURN_S = 0.002
"""Likewise; a frame may be a window for a hundred streams, or a head of 64 KiB in a few bytes."""
_FLUSH_BYTES = 64 * 1024


class Http2Session:
    """The streams of one client connection, which has no other use."""

    __slots__ = (
        "_blocked",
        "_drain_until_s",
        "_in_turn",
        "_input_ended",
        "_starved",
        "_streams",
        "_turn_due",
        "_unflushed_bytes",
        "_untraced_handshake",
        "client",
        "protocol",
    )

    def __init__(self, client: HttpConnection, handshake: HandshakeSummary | None) -> None:
        limits = client.runtime.config.limits
        self.client = client
        self.protocol = Http2Connection(header_bytes=limits.header_bytes, streams=limits.streams)
        self._streams: dict[int, Http2Stream] = {}
        self._blocked: dict[int, Http2Stream] = {}
        """Those that have more to say than the client takes now, the one that has waited longest first."""
        self._starved: dict[int, None] = {}
        """Those of them that wait for the connection's window, in order."""
        self._in_turn = False
        self._turn_due = False
        """Frames wait for the loop's next turn."""
        self._input_ended = False
        self._unflushed_bytes = 0
        self._drain_until_s: float | None = None
        self._untraced_handshake = handshake
        self.flush()

    # What the client's connection calls.

    def client_data(self, data: bytes) -> None:
        """Act on frames, for one turn of the loop."""
        self.protocol.receive(data)
        if not self._turn_due:
            self._take_turn()

    def client_ended(self) -> None:
        """Answer what has been asked in full; the rest never will be."""
        self._input_ended = True
        if not self._turn_due:
            self._end_input()

    def client_writable(self, writable: bool) -> None:
        """Go on sending, or let servers wait; a client that does not read is not read from either."""
        client = self.client
        if writable:
            client.resume(PauseReason.CLIENT)
            for stream_id in list(self._blocked):
                self._go_on(stream_id)
            now_s = monotonic()
            for stream in self._blocked.values():
                stream.await_client(now_s)
            self._set_deadline()
        else:
            client.pause(PauseReason.CLIENT)
            client.deadline = monotonic() + client.runtime.config.timeouts.body_idle_s

    def idle_timeout(self, now_s: float) -> None:
        """End what takes too long: a stream, or the connection."""
        client = self.client
        if client.write_paused:
            if not client.output_progressed(now_s):
                client.abort()
            return
        if not self._streams:
            self._finish()
            return
        for stream in [stream for stream in self._streams.values() if stream.deadline < now_s]:
            stream.on_timeout(now_s)
        self.flush()
        self._set_deadline()

    def drain(self) -> None:
        """Ask for no further requests; those that are on their way are still served."""
        self._drain_until_s = monotonic() + DRAIN_IDLE_S
        self.client.send(self.protocol.announce_end())
        self._set_deadline()

    def close(self) -> None:
        """The client is gone: let go of everything."""
        for stream in list(self._streams.values()):
            stream.abandon()

    # What a stream calls.

    def take_handshake(self) -> HandshakeSummary | None:
        """Return what the first request had to wait for, once."""
        handshake, self._untraced_handshake = self._untraced_handshake, None
        return handshake

    def pump(self, stream: Http2Stream) -> None:
        """Send what `stream` has to say, as far as it goes."""
        starved = False
        while stream.is_blocked and not self.client.write_paused:
            sent = stream.send_frame()
            if sent < 0:
                starved = not self.protocol.has_room
                break
            self._unflushed_bytes += sent
            if self._unflushed_bytes >= _FLUSH_BYTES:
                self.flush()
        if starved:
            self._starved[stream.id] = None
        else:
            self._starved.pop(stream.id, None)
        if not stream.is_blocked:
            self._blocked.pop(stream.id, None)
        elif stream.id not in self._blocked:
            self._blocked[stream.id] = stream
            stream.await_client(monotonic())
        self._flush_outside_turn()

    def give_back(self, stream: Http2Stream, window_bytes: int) -> None:
        """Let the client send as much again, on the stream and on the connection."""
        self.protocol.consumed(stream.id, window_bytes)
        self._flush_outside_turn()

    def deadline_changed(self, stream: Http2Stream) -> None:
        """Be woken in time."""
        client = self.client
        if stream.deadline < client.deadline and not client.write_paused:
            client.deadline = stream.deadline

    def reset(self, stream: Http2Stream, code: ErrorCodes) -> None:
        """End a stream without, or before, its request's end."""
        self.protocol.reset(stream.id, code)
        self.forget(stream)
        self._flush_outside_turn()

    def forget(self, stream: Http2Stream) -> None:
        """Take a stream that has ended off the books."""
        del self._streams[stream.id]
        self._blocked.pop(stream.id, None)
        self._starved.pop(stream.id, None)
        if not self._streams:
            self._set_deadline()
            if self.protocol.client_leaves:
                self._finish()

    def flush(self) -> None:
        """Send what there is, in one go."""
        self._unflushed_bytes = 0
        data = self.protocol.data_to_send()
        if data:
            self.client.send(data)

    # Inside.

    def _take_turn(self) -> None:
        client = self.client
        now_s = monotonic()
        self._in_turn = True
        try:
            for _ in range(FRAMES_PER_TURN):
                if client.phase is not Phase.OPEN:
                    return
                events = self.protocol.next_events(now_s)
                if events is None:
                    return
                for event in events:
                    self._act_on(event)
                if monotonic() - now_s > TURN_S:
                    break
            self._turn_due = True
            client.pause(PauseReason.TURN)
            asyncio.get_running_loop().call_soon(self._next_turn)
        except Http2Error as error:
            client.runtime.metrics.count_rejected(error.rule)
            self.flush()
            client.finish()
        finally:
            self._in_turn = False
            self.flush()

    def _next_turn(self) -> None:
        self._turn_due = False
        if self.client.phase is Phase.OPEN:
            self.client.resume(PauseReason.TURN)
            self._take_turn()
            if self._input_ended and not self._turn_due:
                self._end_input()

    def _end_input(self) -> None:
        for stream in list(self._streams.values()):
            stream.client_ended()
        self.protocol.client_leaves = True
        if not self._streams:
            self._finish()

    def _act_on(self, event: Event) -> None:
        if isinstance(event, HeadersReceived):
            stream = self._streams[event.stream_id] = Http2Stream(self, event.stream_id)
            if len(self._streams) == 1:
                self._set_deadline()
            stream.begin(event.fields, ended=event.ended)
            return
        if isinstance(event, WindowOpened):
            self._window_opened(event.stream_id)
            return
        found = self._streams.get(event.stream_id)
        if isinstance(event, DataReceived):
            if found is None:
                self.protocol.consumed(event.stream_id, event.window_bytes)
            else:
                found.body_received(event)
        elif found is not None:
            if isinstance(event, TrailersReceived):
                found.trailers_received(event.fields)
            elif isinstance(event, StreamReset):
                self.forget(found)
                found.abandon()

    def _window_opened(self, stream_id: int) -> None:
        """Let the stream go on that waited for this, or those that waited for the connection, while its window lasts.

        Each look at a stream uses some of the window or is the last: a byte of it is no occasion to look at them all.
        """
        if stream_id:
            self._go_on(stream_id)
            return
        for waiting_id in list(self._starved):
            if not self.protocol.has_room:
                break
            self._go_on(waiting_id)

    def _go_on(self, stream_id: int) -> None:
        stream = self._blocked.get(stream_id)
        if stream is not None:
            self.pump(stream)
            if not stream.is_blocked:
                stream.drained()

    def _set_deadline(self) -> None:
        client = self.client
        if client.write_paused:
            return
        if self._streams:
            client.deadline = min(stream.deadline for stream in self._streams.values())
        elif self._drain_until_s is not None:
            client.deadline = self._drain_until_s
        else:
            client.deadline = monotonic() + client.runtime.config.timeouts.idle_s

    def _flush_outside_turn(self) -> None:
        """Flush now, unless that comes at the end of this turn."""
        if not self._in_turn:
            self.flush()

    def _finish(self) -> None:
        self.protocol.close()
        self.flush()
        self.client.finish()
