"""Names of servers become addresses, and do so again from time to time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

from tlsproxy.config import Address

_RETRY_S = 1.0
"""A name that stood for nothing yet is asked for again this soon."""

_log = logging.getLogger("tlsproxy.upstream")


async def look_up(address: Address) -> list[Address]:
    """Return all that `address` stands for, sorted, asking off the event loop's thread. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return sorted({Address(str(item[4][0]), address.port) for item in found}, key=str)


class Resolver:
    """Keeps the addresses of one name up to date."""

    def __init__(
        self, address: Address, interval_s: float, on_change: Callable[[Sequence[Address]], None], upstream: str
    ) -> None:
        """`on_change` is given all addresses whenever they are others; `upstream` is a name for the log."""
        self._address = address
        self._interval_s = interval_s
        self._on_change = on_change
        self._upstream = upstream
        self._known: list[Address] = []
        self._failing = False

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s if self._known else min(_RETRY_S, self._interval_s))
            await self.resolve()

    async def resolve(self) -> None:
        """Ask once. A name that can't be resolved leaves everything as it was."""
        try:
            addresses = await look_up(self._address)
        except OSError as error:
            # Asked for every second while it has never been resolved: that is told once.
            _log.log(
                logging.DEBUG if self._failing else logging.WARNING,
                "name not resolved",
                extra={"upstream": self._upstream, "server": str(self._address), "reason": error.strerror},
            )
            self._failing = True
            return
        self._failing = False
        if addresses and addresses != self._known:
            self._known = addresses
            self._on_change(addresses)
