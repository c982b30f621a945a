"""Requests for which no worker has room: first come, first served for each key, and the keys in turn.

So a certificate that is asked for a thousand times a second does not keep the others waiting.
"""

from __future__ import annotations

from collections import deque

from hsm.pool_connection import WorkerConnection
from hsm.pool_request import Request, SigningKey
from hsm.pool_token import PoolToken


class WaitingRoom:
    """The queues of all keys. The keys and tokens themselves hold the queues and an index of them."""

    def __init__(self) -> None:
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, request: Request, *, first: bool = False) -> None:
        """Let `request` wait; `first` for one that has waited before."""
        key = request.key
        if first:
            key.waiting.appendleft(request)
        else:
            key.waiting.append(request)
        self._size += 1
        for token in key.tokens:
            token.waiting[key] = None
            token.waiting_requests += 1

    def take(self, token: PoolToken) -> tuple[Request, WorkerConnection] | None:
        """Return the next request for `token` and the worker that has room for it, or None."""
        for key in token.waiting:
            connection = token.pick(key)
            if connection is None:
                continue
            request = self._next(key, token)
            if request is not None:
                if key in token.waiting:
                    # To the end of the line: the other keys first.
                    del token.waiting[key]
                    token.waiting[key] = None
                return request, connection
        return None

    def purge(self, key: SigningKey) -> None:
        """Forget the requests of `key` that are no longer live."""
        live = deque(request for request in key.waiting if request.live)
        gone = len(key.waiting) - len(live)
        key.waiting = live
        self._forget(key, gone)

    def _next(self, key: SigningKey, token: PoolToken) -> Request | None:
        """Take the first request of `key` that `token` has not failed already."""
        for request in key.waiting:
            if token not in request.tried:
                key.waiting.remove(request)
                self._forget(key, 1)
                return request
        return None

    def _forget(self, key: SigningKey, count: int) -> None:
        self._size -= count
        for token in key.tokens:
            token.waiting_requests -= count
            if not key.waiting:
                token.waiting.pop(key, None)
