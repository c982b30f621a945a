"""One worker process: started, watched, started again. Used by hsm.launcher."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import hsm
from hsm.errors import WorkerFailed
from hsm.messages import KeyInfo, keys_from_json
from hsm.silence import read_line
from hsm.workerspec import WorkerSpec

_MIN_DELAY_S = 0.1
_MAX_DELAY_S = 5.0
_HEALTHY_S = 10.0
"""A worker that was ready for this long is started again without growing delay."""
_MAX_STATUS_BYTES = 2 << 20
_MAX_STEP_CHARACTERS = 64

_log = logging.getLogger(__name__)


class WorkerProcess:
    """A place for one worker: at most one process at a time, a new one whenever one ends, until stopped.

    A worker that says its failure is permanent (the PIN was refused, the token's file is damaged) is not started again,
    nor is any other of the token: tried often enough, a wrong PIN locks a real token. One that is stuck in one step of
    opening the token is killed, and one that was ready and gives no sign of life.
    """

    def __init__(
        self,
        spec_fields: Mapping[str, Any],
        token_failure: Callable[[], str | None],
        open_timeout_s: float,
        hang_timeout_s: float,
        withheld: Collection[str],
    ) -> None:
        """`spec_fields` are those of a WorkerSpec, less `status_fd`, which each process gets anew.

        `token_failure` tells of a permanent failure of any of the token's workers. `open_timeout_s` is for one step of
        opening the token, `hang_timeout_s` for a sign of life from then on. `withheld` are the variables of the
        environment that processes do not inherit.
        """
        self._spec_fields = spec_fields
        self._token_failure = token_failure
        self._open_timeout_s = open_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._withheld = withheld
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._is_ready = False
        self._step = "starting"
        """What the process that runs now does to open the token."""
        self._last_error: str | None = None
        self._has_reported_error = False
        self._stopping = asyncio.Event()
        self.keys: tuple[KeyInfo, ...] = ()
        """Those it announced when it last became ready."""
        self.ready_at_s = 0.0
        """When that was, by the loop's clock; 0 before."""
        self.failure: str | None = None
        """The permanent failure, once there is one."""

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process is not None else None

    @property
    def last_error(self) -> str:
        """Why it is not ready, while it is not."""
        return self._last_error or f"it has not opened the token yet ({self._step})"

    def start(self) -> None:
        """Start the process and keep one running."""
        self._task = asyncio.get_running_loop().create_task(self._keep_running())

    async def wait_ready(self, deadline_s: float) -> None:
        """Wait until a process has opened the token, at most until `deadline_s` of the loop's clock.

        Raises WorkerFailed.
        """
        started_s = asyncio.get_running_loop().time()
        while not self._is_ready:
            if self.failure is not None:
                raise WorkerFailed(self.failure)
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline_s - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                token, waited_s = self._spec_fields["token"], deadline_s - started_s
                raise WorkerFailed(
                    f"token {token}: its worker is not ready after {waited_s:.3g} s: {self.last_error}"
                ) from None

    async def wait_opened(self) -> None:
        """Wait until a process has opened the token, for as long as it takes, or one has failed for good."""
        while not self._is_ready and self.failure is None:
            self._changed.clear()
            await self._changed.wait()

    def terminate(self) -> None:
        """Ask the process to end after what it has in hand, and start no other."""
        self._stopping.set()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    async def stop(self, grace_s: float) -> None:
        """Wait for the process to end after terminate(), and kill it when `grace_s` is over."""
        if self._task is None:
            return
        await asyncio.wait([self._task], timeout=grace_s)
        if not self._task.done():
            self._kill()
            await self._task

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _keep_running(self) -> None:
        loop = asyncio.get_running_loop()
        delay_s = _MIN_DELAY_S
        while not self._stopping.is_set():
            self.failure = self._token_failure()
            if self.failure is not None:
                self._changed.set()
                return
            last_ready_s = self.ready_at_s
            try:
                await self._run_once()
            except OSError as error:
                self._last_error = f"it cannot be started: {error.strerror}"
                _log.error("token %s: worker: %s", self._spec_fields["token"], self._last_error)
            self._is_ready = False
            self._changed.set()
            if self.ready_at_s > last_ready_s and loop.time() - self.ready_at_s > _HEALTHY_S:
                delay_s = _MIN_DELAY_S
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)
            delay_s = min(2 * delay_s, _MAX_DELAY_S)

    async def _run_once(self) -> None:
        """Start one process and see it through to its end. Raises OSError if there is none to be had."""
        self._has_reported_error = False
        self._step = "starting"
        with contextlib.ExitStack() as ours:
            with contextlib.ExitStack() as theirs:
                parent_end, child_end = socket.socketpair()
                ours.enter_context(parent_end)
                theirs.enter_context(child_end)
                status_reader, status_writer = os.pipe()
                statuses = ours.enter_context(io.FileIO(status_reader))
                theirs.callback(os.close, status_writer)
                spec = WorkerSpec(**self._spec_fields, status_fd=status_writer)
                self._process = await self._spawn(spec, child_end.fileno())
            if self._stopping.is_set():
                self._process.terminate()
            with contextlib.suppress(ConnectionError):
                # The socket's buffer takes far more than MAX_SPEC_BYTES: this does not block.
                parent_end.sendall(spec.to_json().encode() + b"\n")
            await self._follow(statuses)
            code = await self._process.wait()
            self._report_end(spec.token, self._process.pid, code)
            self._process = None

    async def _spawn(self, spec: WorkerSpec, spec_fd: int) -> asyncio.subprocess.Process:
        # The child runs the code that runs here, and nothing from a working directory that others may write to.
        code_path = str(Path(hsm.__file__).parent.parent)
        python_path = os.pathsep.join(filter(None, (code_path, os.environ.get("PYTHONPATH"))))
        inherited = {name: value for name, value in os.environ.items() if name not in self._withheld}
        descriptors = (spec_fd, spec.listen_fd, spec.status_fd, spec.metrics_fd)
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hsm.worker",
            str(spec_fd),
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=[fd for fd in descriptors if fd is not None],
            env=inherited | {"PYTHONPATH": python_path, "PYTHONSAFEPATH": "1"},
        )

    async def _follow(self, statuses: io.FileIO) -> None:
        """Take in what the process says of itself, until it ends or closes its side."""
        reader = asyncio.StreamReader(limit=_MAX_STATUS_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), statuses
        )
        try:
            while line := await read_line(reader, self._hang_timeout_s if self._is_ready else self._open_timeout_s):
                self._take_status(json.loads(line))
        except asyncio.TimeoutError:
            if self._is_ready:
                self._take_error(f"it gave no sign of life for {self._hang_timeout_s:g} s")
            else:
                self._take_error(f"it hangs while opening the token: {self._step} for {self._open_timeout_s:g} s")
            self._kill()
        except (ValueError, KeyError, TypeError, RecursionError):
            self._take_error("it reported something other than its status")
            self._kill()
        finally:
            transport.close()

    def _take_status(self, status: dict[str, Any]) -> None:
        if status["state"] == "ready":
            self.keys = keys_from_json(status["keys"])
            self.ready_at_s = asyncio.get_running_loop().time()
            self._is_ready = True
            self._changed.set()
        elif status["state"] == "opening" and not self._is_ready:
            self._step = str(status["step"])[:_MAX_STEP_CHARACTERS]
        elif status["state"] == "failed":
            self._take_error(str(status["error"]))
            if status["permanent"]:
                self.failure = self._last_error
        elif status["state"] != "alive":
            raise ValueError

    def _take_error(self, message: str) -> None:
        self._last_error = message
        self._has_reported_error = True

    def _report_end(self, token: str, pid: int, code: int) -> None:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not self._has_reported_error:
            self._last_error = f"it ended with {how}"
        if self._stopping.is_set():
            _log.info("token %s: worker %d ended with %s", token, pid, how)
        elif self.failure is not None:
            _log.error("token %s: worker %d failed for good: %s", token, pid, self.failure)
        else:
            why = f": {self._last_error}" if self._has_reported_error else ""
            _log.warning("token %s: worker %d ended with %s%s; another is started", token, pid, how, why)
