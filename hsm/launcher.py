"""Starts the workers of a token, keeps them running, and ends them.

Each worker has a listening Unix socket that is made here and outlives it: a client's connection waits in the socket's
backlog while the worker is replaced. A worker learns what it is to do over an inherited socket pair, never from its
command line, and takes the closing of that pair as the death of its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hsm.errors import TokenConfigError
from hsm.logs import LogFormat, LogLevel
from hsm.messages import KeyInfo
from hsm.metricstore import create_store
from hsm.pool import SignerPool, TokenEndpoints
from hsm.worker_process import WorkerProcess

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_SOCKET_PATH_BYTES = 107
_BACKLOG = 512
_READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftToken:
    """A soft token: its file and where its PIN is. Each worker signs with one core."""

    kind: ClassVar[str] = "soft"
    name: str
    path: str
    pin_file: str | None = None
    pin_env: str | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pkcs11Token:
    """A token behind a PKCS#11 library, found by label, serial number or slot.

    Its worker signs with the `keys` (labels or pkcs11: URIs) alone; given none, with all that can serve TLS.
    """

    kind: ClassVar[str] = "pkcs11"
    name: str
    module: str
    token_label: str | None = None
    token_serial: str | None = None
    slot: int | None = None
    pin_file: str | None = None
    pin_env: str | None = None
    sessions: int = 1
    keys: tuple[str, ...] = ()
    workers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AwsKmsToken:
    """Keys in AWS KMS, in one region: key ids, ARNs or `alias/NAME`. The credentials are what botocore finds."""

    kind: ClassVar[str] = "awskms"
    name: str
    region: str
    keys: tuple[str, ...]
    endpoint_url: str | None = None
    sessions: int = 1
    workers: int = 1


Token = SoftToken | Pkcs11Token | AwsKmsToken


class WorkerGroup:
    """The workers of one token, and their sockets in a directory that only this user can enter."""

    def __init__(
        self,
        token: Token,
        directory: str,
        *,
        log_level: LogLevel = "info",
        log_format: LogFormat = "text",
        open_timeout_s: float = 20.0,
        hang_timeout_s: float = 10.0,
        run_as: tuple[int, ...] = (),
        client: tuple[int, ...] = (),
        withheld: Collection[str] = (),
    ) -> None:
        """Make the sockets, in `directory` (made with mode 0700 if it is not there). Workers log to stderr.

        A worker that is stuck for `open_timeout_s` in one step of opening the token is killed and replaced, and so
        is one that is ready and then gives no sign of life for `hang_timeout_s`. Started by root, workers become the
        user `run_as`, and take requests from the user `client`, who can enter the directory: both are uid, gid and
        supplementary gids, or empty for the user this process runs as. They inherit the environment without the
        variables `withheld`, such as other tokens' PINs.

        Raises TokenConfigError, and OSError when a socket cannot be made.
        """
        if not _NAME.fullmatch(token.name):
            raise TokenConfigError(f"token name {token.name!r}: expected letters, digits and ._- (at most 64)")
        group = client[1] if client else None
        make_private(directory, group)
        self.token = token
        self._paths = [os.path.join(directory, f"{token.name}-{n}.sock") for n in range(token.workers)]
        self._listeners = [_listen(path, group) for path in self._paths]
        self.metric_fds: tuple[int, ...] = tuple(create_store() for _ in self._paths)
        """The workers' MetricStores: they last as long as the group, whatever happens to a worker."""
        fields = _spec_fields(token) | {
            "log_level": log_level,
            "log_format": log_format,
            "run_as": run_as,
            "allowed_uid": client[0] if client else os.getuid(),
        }
        self._workers = [
            WorkerProcess(
                fields | {"listen_fd": listener.fileno(), "metrics_fd": metrics_fd},
                lambda: self.failure,
                open_timeout_s,
                hang_timeout_s,
                withheld,
            )
            for listener, metrics_fd in zip(self._listeners, self.metric_fds, strict=True)
        ]
        self._starting: asyncio.Task[None] | None = None

    @property
    def endpoints(self) -> TokenEndpoints:
        """What a SignerPool needs to know."""
        return TokenEndpoints(self.token.name, tuple(self._paths))

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers that run now."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    @property
    def keys(self) -> tuple[KeyInfo, ...]:
        """The keys that the worker which came up last has announced."""
        return max(self._workers, key=lambda worker: worker.ready_at_s).keys

    @property
    def was_ready(self) -> bool:
        """A worker has opened the token at some time: `keys` says what is in it."""
        return any(worker.ready_at_s for worker in self._workers)

    @property
    def failure(self) -> str | None:
        """Why a worker failed for good and is not started again, in its own words; None while none has."""
        return next((worker.failure for worker in self._workers if worker.failure is not None), None)

    @property
    def last_error(self) -> str:
        """Why the first worker is not ready, while it is not."""
        return self._workers[0].last_error

    def start(self) -> None:
        """Start the workers; return at once.

        The first is alone until it has opened the token: had each tried a PIN that is refused, a token that counts
        failures would lock itself.
        """
        self._starting = asyncio.get_running_loop().create_task(self._start_in_turn())

    async def _start_in_turn(self) -> None:
        first, *others = self._workers
        first.start()
        await first.wait_opened()
        for worker in others:
            worker.start()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until all workers have opened the token.

        Raises WorkerFailed when one failed for good, or is not ready in time.
        """
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        for worker in self._workers:
            await worker.wait_ready(deadline_s)

    async def stop(self, grace_s: float = 5.0, absorb: Callable[[int], None] | None = None) -> None:
        """End the workers, with SIGTERM and after `grace_s` with SIGKILL, and take the sockets away.

        `absorb` is called with each worker's MetricStore before that is closed.
        """
        if self._starting is not None:
            self._starting.cancel()
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            await worker.stop(grace_s)
        for listener, path in zip(self._listeners, self._paths, strict=True):
            listener.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        metric_fds, self.metric_fds = self.metric_fds, ()
        for fd in metric_fds:
            if absorb is not None:
                absorb(fd)
            os.close(fd)


@contextlib.asynccontextmanager
async def open_pool(
    tokens: Sequence[Token], *, log_level: LogLevel = "info", **options: Any
) -> AsyncIterator[SignerPool]:
    """Start the workers of `tokens` and give a SignerPool of them (with its `options`) while the context lasts.

    Raises TokenConfigError, WorkerFailed and SignerUnavailable.
    """
    with tempfile.TemporaryDirectory(prefix="hsm-") as directory:
        groups = [WorkerGroup(token, directory, log_level=log_level) for token in tokens]
        try:
            for group in groups:
                group.start()
            for group in groups:
                await group.wait_ready(_READY_TIMEOUT_S)
            async with SignerPool([group.endpoints for group in groups], **options) as pool:
                await pool.wait_ready(_READY_TIMEOUT_S)
                yield pool
        finally:
            for group in groups:
                await group.stop()


def _spec_fields(token: Token) -> dict[str, Any]:
    """Return the fields of a WorkerSpec that say which token."""
    fields = dataclasses.asdict(token)
    del fields["workers"]
    return {"token": fields.pop("name"), "kind": token.kind, **fields}


def make_private(directory: str, group: int | None = None) -> None:
    """Make `directory`, or see that nobody but this user can reach what is in it.

    With `group`, its members can open what they know the name of and may open. Raises TokenConfigError and OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    found = os.lstat(directory)
    if group is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
        os.chown(directory, -1, group)
        os.chmod(directory, 0o710)  # noqa: S103 - that group is to pass
        found = os.lstat(directory)
    others = 0o077 if group is None else 0o067
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & others:
        mode = stat.S_IMODE(found.st_mode)
        raise TokenConfigError(
            f"{directory}: expected a directory of uid {os.geteuid()} with mode 0700; "
            f"got {stat.filemode(found.st_mode)[0]!r}, uid {found.st_uid}, mode {mode:04o}"
        )


def _listen(path: str, group: int | None) -> socket.socket:
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise TokenConfigError(f"{path}: expected a path of at most {_MAX_SOCKET_PATH_BYTES} bytes for a Unix socket")
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, 0o600 if group is None else 0o660)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
