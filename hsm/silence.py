"""How long a process may say nothing before it is held to hang."""

from __future__ import annotations

import asyncio
from typing import Final

_LOOKS: Final = (0.75, 0.25)
"""The parts of the time after which it is looked whether a line has come."""


async def read_line(reader: asyncio.StreamReader, timeout_s: float | None) -> bytes:
    """Return the next line, or what is left before the end; `timeout_s` of None is for ever.

    This process may have been stopped itself (a paused container, a machine that slept): its timers are then due before
    it has read what has come. So silence counts only when a second look has found it, too.

    Raises asyncio.TimeoutError, ConnectionError, and ValueError for a line longer than the reader's limit.
    """
    reading = asyncio.ensure_future(reader.readline())
    try:
        for part in _LOOKS:
            done, _ = await asyncio.wait((reading,), timeout=None if timeout_s is None else timeout_s * part)
            if done:
                return await reading
        raise asyncio.TimeoutError
    finally:
        reading.cancel()
