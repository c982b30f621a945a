"""The asyncio side of signing: a SignerPool sends requests to the workers of its tokens and awaits the signatures."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic_ns
from types import TracebackType
from typing import Any

from hsm.canary import Canary
from hsm.dispatch import Dispatcher
from hsm.errors import HsmError, SignerUnavailable
from hsm.messages import MAX_TBS_BYTES, KeyInfo, SignatureScheme
from hsm.metricstore import MetricStore
from hsm.pool_connection import WorkerConnection, keep_connected
from hsm.pool_request import Request, Signature, SigningKey
from hsm.pool_token import PoolToken, TokenEndpoints
from hsm.sweep import Sweep

__all__ = ["Signature", "SignerPool", "SigningKey", "TokenEndpoints"]

_CANARY_DEADLINE_NS = 1_000_000_000

_log = logging.getLogger(__name__)


class SignerPool:
    """Signs with keys that other processes hold.

    The workers are found at the Unix sockets of `tokens`; `hsm.launcher.open_pool` also starts them:

        from hsm.launcher import SoftToken, open_pool
        from hsm.messages import SignatureScheme

        async with open_pool([SoftToken(name="local", path="token", pin_file="token.pin")]) as pool:
            signature = await pool.sign("www", SignatureScheme.ECDSA_SECP256R1_SHA256, tbs)
            print(len(signature.value), signature.token, signature.queue_s, signature.sign_s)

    A pool belongs to one event loop. Signing is idempotent, so a request may be sent more than once: again when its
    worker dies, to another token when one fails or is slow. The first signature counts. None outlives its deadline.

    A request that finds no worker of its key's tokens up waits for one, if the last was up within a second or the pool
    has started within a second: workers are restarted in less. Otherwise it fails at once.
    """

    def __init__(
        self,
        tokens: Sequence[TokenEndpoints],
        *,
        sign_deadline_s: float = 2.0,
        max_pending: int = 2048,
        metrics: MetricStore | None = None,
    ) -> None:
        """`sign_deadline_s` is the default of submit(); of more than `max_pending` requests the newest are refused.

        Without `metrics` the pool counts in a store of its own.
        """
        self._own_store = MetricStore() if metrics is None else None
        store = metrics or self._own_store
        assert store is not None
        self._tokens = {endpoints.name: PoolToken(endpoints, store, monotonic_ns()) for endpoints in tokens}
        self._sign_deadline_ns = int(sign_deadline_s * 1e9)
        self._dispatcher = Dispatcher(tuple(self._tokens.values()), store, max_pending)
        self._sweep = Sweep(self._dispatcher, self._sign_deadline_ns)
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._keys: dict[tuple[str, tuple[str, ...], bytes | None], SigningKey] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Begin to connect to the workers; return at once."""
        self._loop = asyncio.get_running_loop()
        for token in self._tokens.values():
            token.last_up_ns = monotonic_ns()
            for path in token.sockets:
                self._spawn(keep_connected(path, token, self._dispatcher))

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until a worker of every token is up. Raises SignerUnavailable after `timeout_s`."""
        changed = asyncio.Event()
        self.on_change.append(changed.set)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            while missing := sorted(self._tokens.keys() - self.tokens_up()):
                try:
                    await asyncio.wait_for(changed.wait(), deadline_s - asyncio.get_running_loop().time())
                except asyncio.TimeoutError:
                    raise SignerUnavailable(f"no worker is up of token {', '.join(missing)}") from None
                changed.clear()
        finally:
            self.on_change.remove(changed.set)

    async def close(self) -> None:
        """Fail what is pending and end all connections."""
        self._loop = None
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None
        self.on_change.clear()
        for request in tuple(self._dispatcher.live):
            self._dispatcher.fail(request, SignerUnavailable("the pool was closed"))
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._own_store is not None:
            self._own_store.close()
            self._own_store = None

    async def __aenter__(self) -> SignerPool:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def key(self, name: str, tokens: Sequence[str] | None = None, public_key: bytes | None = None) -> SigningKey:
        """Return the handle of a key: of the `tokens` (all, unless given), by its label or a `pkcs11:` URI (RFC 7512).

        With `public_key` (SubjectPublicKeyInfo, DER) a worker whose key of this name is another one is not used for it:
        a signature that does not fit the certificate must not reach a client. Raises ValueError.
        """
        names = tuple(self._tokens) if tokens is None else tuple(tokens)
        unknown = [token for token in names if token not in self._tokens]
        if unknown or not names:
            raise ValueError(f"expected tokens out of {', '.join(self._tokens)}; got {', '.join(unknown) or 'none'}")
        identity = (name, names, public_key)
        if identity not in self._keys:
            self._keys[identity] = SigningKey(name, tuple(self._tokens[token] for token in names), public_key)
        return self._keys[identity]

    def submit(
        self, key: SigningKey, scheme: SignatureScheme, tbs: bytes, deadline_ns: int | None = None
    ) -> asyncio.Future[Signature]:
        """Ask for a signature of `tbs` (at most 1024 bytes); `deadline_ns` is on CLOCK_MONOTONIC.

        The future fails with DeadlineExceeded, KeyNotFound, Overloaded, PolicyRejected, SignerUnavailable or
        TokenError. Cancel it to forget the request.
        """
        if len(tbs) > MAX_TBS_BYTES:
            raise ValueError(f"expected at most {MAX_TBS_BYTES} bytes to be signed; got {len(tbs)}")
        if self._loop is None:
            raise RuntimeError("the pool is not open")
        future: asyncio.Future[Signature] = self._loop.create_future()
        now_ns = monotonic_ns()
        if deadline_ns is None:
            deadline_ns = now_ns + self._sign_deadline_ns
        self._dispatcher.accept(Request(future, key, scheme, tbs, now_ns, deadline_ns))
        if self._sweep_timer is None:
            self._arm_sweep(self._loop)
        return future

    async def sign(self, key: SigningKey | str, scheme: SignatureScheme, tbs: bytes) -> Signature:
        """Return a signature of `tbs`. Raises what the future of submit() does, and ValueError."""
        if isinstance(key, str):
            key = self.key(key)
        return await self.submit(key, scheme, tbs)

    @property
    def pending(self) -> int:
        """Requests that are not settled."""
        return len(self._dispatcher.live)

    @property
    def on_change(self) -> list[Callable[[], None]]:
        """Functions to call whenever workers come or go, or a token's circuit opens or closes."""
        return self._dispatcher.on_change

    def tokens_up(self) -> set[str]:
        """Return the tokens of which a worker is up."""
        return {name for name, token in self._tokens.items() if token.connections}

    def can_sign(self, key: SigningKey) -> bool:
        """Tell whether a worker is up that has `key`, at a token whose circuit is closed."""
        return self._dispatcher.can_sign(key)

    def schemes(self, key: SigningKey) -> frozenset[SignatureScheme]:
        """Return the schemes that every worker which is up and has `key` can sign with: some tokens know no RSA-PSS."""
        known = [
            frozenset(info.schemes)
            for token in key.tokens
            for connection in token.connections
            if (info := connection.key_info(key)) is not None
        ]
        return frozenset.intersection(*known) if known else frozenset()

    def _arm_sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweep_timer = loop.call_later(self._sweep.interval_s, self._run_sweep, loop)

    def _run_sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweep_timer = None
        for token in self._sweep.run():
            self._spawn(self._probe(token))
        if self._sweep.is_needed:
            self._arm_sweep(loop)

    async def _probe(self, token: PoolToken) -> None:
        """Ask a token that is not trusted for a signature that can be verified; trust it again if it is right."""
        dispatcher = self._dispatcher
        failure = await self._canary_failure(token)
        if failure is None:
            token.circuit.close()
            token.load.begin_slow_start(monotonic_ns())
            dispatcher.circuit_changed(token)
            dispatcher.serve_waiting(token)
        elif token.circuit.probe_failed(monotonic_ns(), failure):
            _log.warning("token %s: canary failed, the circuit stays open", token.name, extra={"reason": failure})

    async def _canary_failure(self, token: PoolToken) -> str | None:
        """Return why the canary failed, for people, or None if the token made the right signature."""
        chosen = self._canary_worker(token)
        if chosen is None or self._loop is None:
            return "no worker is up that has room and a key in use"
        key, connection, info = chosen
        canary = Canary(info)
        now_ns = monotonic_ns()
        request = Request(
            self._loop.create_future(), key, canary.scheme, canary.tbs, now_ns, now_ns + _CANARY_DEADLINE_NS
        )
        request.pinned = True
        self._dispatcher.live.add(request)
        self._dispatcher.send(request, connection, now_ns)
        try:
            signature = await request.future
        except HsmError as error:
            return str(error)
        return None if canary.is_answered_by(signature.value) else "its signature is wrong"

    def _canary_worker(self, token: PoolToken) -> tuple[SigningKey, WorkerConnection, KeyInfo] | None:
        """Return a worker of `token` that has room, and a key in use that it has."""
        for connection in token.connections:
            if len(connection.in_flight) < connection.window:
                for key in self._keys.values():
                    if token in key.tokens and (info := connection.key_info(key)) is not None:
                        return key, connection, info
        return None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
