"""The live document for all who watch: made once a second however many they are, and not at all while nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from time import monotonic

from tlsproxy.serve.admin_pages import Source
from tlsproxy.serve.live_document import FAMILIES, READINGS, describe
from tlsproxy.serve.rates import Reading

INTERVAL_S = 1.0
MAX_WATCHERS = 16

_logger = logging.getLogger("tlsproxy.admin")


class TooManyWatchersError(Exception):
    """MAX_WATCHERS are watching."""


class LiveFeed:
    """Server-sent events (HTML Living Standard, section 9.2), one document each."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._watchers = 0
        self._event = b""
        self._next = asyncio.Event()
        self._making: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the events from now on. One who is slow misses some. Raises TooManyWatchersError."""
        if self._watchers >= MAX_WATCHERS:
            raise TooManyWatchersError
        self._watchers += 1
        if self._making is None:
            self._event = b""
            self._making = asyncio.create_task(self._make())
        try:
            async with contextlib.aclosing(self._events()) as events:
                yield events
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._making.cancel()
                self._making = None

    async def _events(self) -> AsyncGenerator[bytes, None]:
        # A browser that has lost the proxy asks again after so many milliseconds.
        yield b"retry: 1000\n\n"
        last = b""
        while True:
            if self._event is last:
                await self._next.wait()
            last = self._event
            yield last

    async def _make(self) -> None:
        readings: deque[Reading] = deque(maxlen=READINGS)
        while True:
            try:
                readings.append(Reading(monotonic(), self._source.read(FAMILIES)))
                document = describe(readings, self._source.snapshot(), self._source.slowest())
                self._event = b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"
            except Exception:
                _logger.exception("live status failed")
            self._next.set()
            self._next = asyncio.Event()
            await asyncio.sleep(INTERVAL_S)
