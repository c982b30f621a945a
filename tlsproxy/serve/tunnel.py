"""mode: tcp: TLS ends here, its bytes go to an upstream and back, whatever they mean.

Each direction ends on its own (close_notify on the client's side, FIN on the upstream's), and each is paused while the
other side is full.
"""

from __future__ import annotations

import math
from time import monotonic
from typing import TYPE_CHECKING

from tlsproxy.errors import UpstreamError
from tlsproxy.serve.client import ClientConnection, PauseReason
from tlsproxy.serve.upstream import Upstream, UpstreamConnection

if TYPE_CHECKING:
    from tlsproxy.serve.listener import ListenerRuntime


class TunnelConnection(ClientConnection):
    """A client whose bytes are passed on. It owns its upstream connection."""

    __slots__ = ("_connection", "_from_client_ended", "_from_upstream_ended", "_pending", "_upstream")

    def __init__(self, runtime: ListenerRuntime) -> None:
        super().__init__(runtime)
        assert runtime.config.upstream is not None
        self._upstream: Upstream = runtime.upstreams[runtime.config.upstream]
        self._connection: UpstreamConnection | None = None
        self._pending: list[bytes] = []
        self._from_client_ended = False
        self._from_upstream_ended = False

    # What ClientConnection calls.

    def established(self) -> None:
        """Connect to the upstream; until then the client is not read."""
        self.deadline = math.inf
        self.pause(PauseReason.UPSTREAM)
        self._upstream.acquire(self, fresh=True)

    def plaintext_received(self, data: bytes) -> None:
        """Pass on."""
        if self._connection is None:
            self._pending.append(data)
        else:
            self._connection.write((data,))
            self._touch()

    def input_ended(self) -> None:
        """Pass the end on, and close once both directions have ended."""
        self._from_client_ended = True
        if self._from_upstream_ended:
            self.finish()
        elif self._connection is not None:
            self._connection.write_eof()

    def output_writable(self, writable: bool) -> None:
        """Stop or resume the upstream."""
        if self._connection is not None:
            if writable:
                self._connection.resume_reading()
            else:
                self._connection.pause_reading()

    def open_timeout(self, now_s: float) -> None:
        """Close if nothing has passed in either direction for too long."""
        if not self.write_paused or not self.output_progressed(now_s):
            self.finish()

    def ended(self) -> None:
        """Let go of the upstream."""
        if self._connection is not None:
            self._connection.abort()
            self._connection = None
        else:
            self._upstream.cancel(self)

    def drain(self) -> None:
        """Go on: only the protocol inside knows when it may end."""

    # What the upstream calls.

    def upstream_ready(self, connection: UpstreamConnection) -> None:
        """Begin to pass bytes."""
        self._connection = connection
        if self._pending:
            connection.write(self._pending)
            self._pending.clear()
        if self._from_client_ended:
            connection.write_eof()
        self._touch()
        self.resume(PauseReason.UPSTREAM)

    def upstream_failed(self, error: UpstreamError) -> None:
        """Close: there is no one to talk to."""
        self._upstream.metrics.count_error(error.reason)
        self.abort()

    def upstream_data(self, data: bytes) -> None:
        """Pass on."""
        self.send(data)
        self._touch()

    def upstream_eof(self) -> bool:
        """Pass the end on, and close once both directions have ended."""
        self._from_upstream_ended = True
        if self._from_client_ended:
            self.finish()
            return False
        self.end_output()
        return True

    def upstream_lost(self, error: Exception | None) -> None:
        """Close; after an error without close_notify, for something is missing."""
        self._connection = None
        if error is None:
            self.finish()
        else:
            self._upstream.metrics.count_error("connection_lost")
            self.abort()

    def upstream_writable(self, writable: bool) -> None:
        """Let the client go on sending, or not."""
        if writable:
            self.resume(PauseReason.UPSTREAM)
        else:
            self.pause(PauseReason.UPSTREAM)

    def _touch(self) -> None:
        self.deadline = monotonic() + self.runtime.config.timeouts.tunnel_idle_s
