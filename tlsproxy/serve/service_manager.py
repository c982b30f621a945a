"""What the service manager that started this process wants to hear, and the sockets it has passed.

The protocols are those of sd_notify(3) and sd_listen_fds(3). Without a service manager nothing happens. Its variables
leave the environment: children are not to speak for us.
"""

from __future__ import annotations

import os
import socket
from time import monotonic_ns

from tlsproxy.serve.sockets import NO_SOCKETS, ListeningSockets, adopt

_FIRST_FD = 3


class ServiceManager:
    """The service manager's end, if there is one."""

    def __init__(self) -> None:
        """Take what the environment says out of it."""
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_pid = os.environ.pop("WATCHDOG_PID", str(os.getpid()))
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog_s: float | None = None
        """How often `alive` is to be called, so that one call may come late."""
        if watchdog_us.isdigit() and watchdog_pid == str(os.getpid()):
            self.watchdog_s = int(watchdog_us) / 2e6

    def ready(self) -> None:
        """Serving, at first or again after a reload."""
        self._notify(f"READY=1\nMAINPID={os.getpid()}")

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """No more connections are accepted."""
        self._notify("STOPPING=1")

    def alive(self) -> None:
        """The event loop goes round."""
        self._notify("WATCHDOG=1")

    def _notify(self, state: str) -> None:
        if not self._address:
            return
        # A leading @ stands for the zero byte of Linux' abstract names.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(state.encode(), address)
        except OSError:
            # A manager that does not listen any more is no reason to stop serving.
            return


def passed_sockets() -> ListeningSockets:
    """Return the listening sockets that the service manager has opened for us. Raises StartupError."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return NO_SOCKETS
    descriptors = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in descriptors:
        os.set_inheritable(fd, False)
    return adopt(socket.socket(fileno=fd) for fd in descriptors)
