"""The connection of a listener without TLS: what TlsConnection does, with nothing to do."""

from __future__ import annotations

from tlsproxy.tls.errors import ConnectionClosedError
from tlsproxy.tls.events import CloseNotify, Event, PlaintextReceived


class PlainConnection:
    """Bytes pass as they are; a FIN stands for close_notify, for there is nothing to tell a cut from an end."""

    __slots__ = ("_closed", "_output")

    def __init__(self) -> None:
        self._output: list[bytes] = []
        self._closed = False

    def receive_data(self, data: bytes) -> list[Event]:
        """Take bytes from the client."""
        return [PlaintextReceived(data)]

    def receive_eof(self) -> list[Event]:
        """Take note that the client's bytes have ended."""
        return [CloseNotify()]

    def send(self, *pieces: bytes) -> None:
        """Queue `pieces`. Raises ConnectionClosedError after close."""
        if self._closed:
            raise ConnectionClosedError("send after close")
        self._output += pieces

    def data_to_send(self) -> bytes:
        """Take what is queued."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def close(self) -> None:
        """Send no more."""
        self._closed = True

    def abort(self) -> None:
        """Drop what was not sent."""
        self._closed = True
        self._output.clear()
