"""A proxy worker process as the supervisor sees it: started, listened to, started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from time import monotonic

from hsm.metricstore import MetricStore, create_store
from hsm.silence import read_line
from tlsproxy.errors import StartupError
from tlsproxy.serve.anatomy import SlowestHandshakes, SlowHandshake
from tlsproxy.serve.control import (
    MAX_LINES_PER_S,
    MAX_STATUS_BYTES,
    Command,
    Drain,
    ProxyWorkerSpec,
    State,
    Status,
    encode_command,
    parse_line,
)

READY_TIMEOUT_S = 30.0
"""How long a process may take until it accepts connections."""
_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_HEALTHY_AFTER_S = 10.0
"""A worker that has run so long was sound: its end starts the back-off anew."""
_EXIT_GRACE_S = 2.0

_logger = logging.getLogger("tlsproxy.supervisor")


class ProxyWorker:
    """One of N workers. Its metrics live here, so its successor goes on with them and with the listening sockets.

    A process that gives no sign of life for `hang_timeout_s` is killed, and one that is not ready in READY_TIMEOUT_S.
    """

    def __init__(
        self,
        index: int,
        listeners: Sequence[Sequence[socket.socket]],
        make_spec: Callable[[ProxyWorker], ProxyWorkerSpec],
        environment: Mapping[str, str],
        on_restart: Callable[[], None],
        hang_timeout_s: float,
    ) -> None:
        """`make_spec` is asked at each start, `on_restart` called before each start but the first."""
        self.index = index
        self.listeners = tuple(listeners)
        """For each listener the sockets the worker accepts on. They are somebody else's to close."""
        self.metrics_fd = create_store()
        self.pid: int | None = None
        self.ready = False
        self.closed = False
        """There are no metrics any more."""
        self.slowest = SlowestHandshakes()
        """As the process has told."""
        self._lines = 0
        self._lines_since_s = monotonic()
        self._make_spec = make_spec
        self._environment = environment
        self._on_restart = on_restart
        self._hang_timeout_s = hang_timeout_s
        self._first_status: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._commands: asyncio.StreamWriter | None = None
        self._task = asyncio.create_task(self._keep_running())

    async def wait_started(self) -> None:
        """Wait until the first process accepts connections. Raises StartupError if it can't."""
        try:
            status = await asyncio.wait_for(asyncio.shield(self._first_status), READY_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise StartupError(f"proxy worker {self.index} did not start within {READY_TIMEOUT_S:.0f} s") from None
        if status.state is not State.READY:
            raise StartupError(f"proxy worker {self.index}: {status.error}")

    def send(self, command: Command) -> None:
        """Send a command to the process, if there is one; a later one gets the news from its specification."""
        if self._commands is not None:
            self._commands.write(encode_command(command))

    async def drain(self, timeout_s: float) -> None:
        """Let the process finish what is under way, for `timeout_s` at most; start no other."""
        self._stopping = True
        self.ready = False
        if self._commands is None:
            # Between two processes, or before one has been told what to serve: no client is lost.
            self._task.cancel()
        self.send(Drain(timeout_s))
        await asyncio.wait([self._task], timeout=timeout_s + _EXIT_GRACE_S)

    async def close(self, absorb: Callable[[int], None]) -> None:
        """End the process at once; `absorb` is called with its metrics before they are closed."""
        if self.closed:
            return
        self._stopping = True
        self._task.cancel()
        await asyncio.wait([self._task])
        absorb(self.metrics_fd)
        os.close(self.metrics_fd)
        self.closed = True

    async def _keep_running(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started = monotonic()
            failure = "ended before it was ready"
            try:
                await self._run_once()
            except OSError as error:
                failure = f"cannot be started: {error.strerror}"
                _logger.error("proxy worker cannot be started", extra={"worker": self.index, "error": error.strerror})
            if not self._first_status.done():
                self._first_status.set_result(Status(State.FAILED, failure))
            if self._stopping:
                return
            if monotonic() - started > _HEALTHY_AFTER_S:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s * random.uniform(0.8, 1.2))  # noqa: S311  # no secret
            backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)
            self._on_restart()

    async def _run_once(self) -> None:
        """Run one process to its end. On cancellation it is killed. Raises OSError if there is none to be had."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_STATUS_BYTES)
            starting = asyncio.create_task(self._start_process(theirs.fileno()))
            try:
                process = await asyncio.shield(starting)
            except BaseException as error:
                writer.close()
                if isinstance(error, asyncio.CancelledError):
                    # A process that is started half-way could not be waited for.
                    process = await starting
                    process.kill()
                    await process.wait()
                raise
        # From here to the specification nothing is awaited: a command that comes meanwhile would be lost.
        self.pid = process.pid
        self._commands = writer
        listening = asyncio.create_task(self._listen(reader, process))
        try:
            self.send(self._make_spec(self))
            code = await process.wait()
            # Its last words may not have been read yet.
            await asyncio.wait((listening,), timeout=_EXIT_GRACE_S)
            if not self._stopping:
                _logger.error("proxy worker ended", extra={"worker": self.index, "pid": process.pid, "code": code})
        finally:
            listening.cancel()
            if process.returncode is None:
                process.kill()
                await process.wait()
            self.ready = False
            self.pid = self._commands = None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self._zero_gauges()

    async def _start_process(self, control_fd: int) -> asyncio.subprocess.Process:
        listener_fds = [sock.fileno() for sockets in self.listeners for sock in sockets]
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tlsproxy.serve.worker",
            str(control_fd),
            pass_fds=[control_fd, self.metrics_fd, *listener_fds],
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
        )

    async def _listen(self, reader: asyncio.StreamReader, process: asyncio.subprocess.Process) -> None:
        """Take the worker's word. One that doesn't keep to the protocol is not to be trusted with clients either."""
        timeout_s: float | None = READY_TIMEOUT_S
        try:
            while line := await read_line(reader, timeout_s):
                self._count_line()
                status = parse_line(line)
                if isinstance(status, SlowHandshake):
                    self.slowest.rotate()
                    self.slowest.add(status)
                    continue
                timeout_s = self._hang_timeout_s if status.state is State.READY else None
                self.ready = status.state is State.READY and not self._stopping
                if status.state is State.FAILED:
                    _logger.error("proxy worker failed", extra={"worker": self.index, "error": status.error})
                if not self._first_status.done():
                    self._first_status.set_result(status)
        except ConnectionError:
            return
        except asyncio.TimeoutError:
            _logger.error("proxy worker hangs", extra={"worker": self.index, "timeout_s": timeout_s})
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        except ValueError as error:
            _logger.error("proxy worker broke the protocol", extra={"worker": self.index, "error": str(error)})
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _count_line(self) -> None:
        """Raises ValueError for too many in too short a time."""
        now = monotonic()
        if now - self._lines_since_s > 1.0:
            self._lines, self._lines_since_s = 0, now
        self._lines += 1
        if self._lines > MAX_LINES_PER_S:
            raise ValueError(f"at most {MAX_LINES_PER_S} lines a second expected")

    def _zero_gauges(self) -> None:
        """Nothing is in flight in a process that is gone: opening its store says so. A spoilt store is replaced."""
        fd = os.dup(self.metrics_fd)
        try:
            MetricStore(fd).close()
        except ValueError:
            os.close(fd)
            os.close(self.metrics_fd)
            self.metrics_fd = create_store()
