"""Log lines to a descriptor whose reader may be slow or stuck: what does not fit is dropped, never waited for."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable


class LineOutput:
    """Writes to a descriptor that other processes share, without touching its flags, which they share too."""

    def __init__(self, fd: int) -> None:
        self.dropped = 0
        """Lines lost since this was last set to 0."""
        self._write, self._close = _writer(fd)
        self._rest = b""
        """What is left of a line that went out in part: nothing else may come before it."""

    def write(self, line: bytes) -> bool:
        """Write one whole line, or the rest of it later; tell whether it was taken."""
        try:
            while self._rest:
                self._rest = self._rest[self._write(self._rest) :]
            self._rest = line[self._write(line) :]
        except OSError:
            self.dropped += 1
            return False
        return True

    def close(self) -> None:
        """Let go of it; `fd` stays open."""
        self._close()


def _writer(fd: int) -> tuple[Callable[[bytes], int], Callable[[], None]]:
    """Return what writes to `fd` as far as it can at once, or raises BlockingIOError, and what ends that."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISSOCK(kind):
        stream = socket.socket(fileno=os.dup(fd))
        return lambda data: stream.send(data, socket.MSG_DONTWAIT), stream.close
    if stat.S_ISREG(kind):
        return lambda data: os.write(fd, data), lambda: None
    try:
        # A pipe or terminal opened anew has flags of its own.
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return _Polled(fd).write, lambda: None
    return lambda data: os.write(own, data), lambda: os.close(own)


class _Polled:
    """For a pipe of another user's, which can't be opened: one that can be written to takes PIPE_BUF bytes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> int:
        """Write as much as is sure not to wait."""
        if not self._poll.poll(0):
            raise BlockingIOError
        return os.write(self._fd, data[: select.PIPE_BUF])
