"""A proxy worker's process as the supervisor sees it, at each step of its start and of its end."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm.launcher import SoftToken, WorkerGroup
from hsm.messages import KeyType
from hsm.silence import read_line
from tests.tokens import make_soft_token
from tlsproxy.errors import StartupError
from tlsproxy.serve import processes
from tlsproxy.serve.control import Drain, State, Status
from tlsproxy.serve.processes import ProxyWorker

EVENT_LOOPS = ("uvloop",)
READY = Status(State.READY).to_line()

MakeWorker = Callable[[str], ProxyWorker]


@pytest.fixture
def make_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorker]:
    """Give a function that keeps processes running that do what a program says: `control` is their socket."""
    program, python = tmp_path / "python", sys.executable
    monkeypatch.setattr(processes.sys, "executable", str(program))

    def make(text: str) -> ProxyWorker:
        control = "control = socket.socket(fileno=int(sys.argv[3]))"
        program.write_text("\n".join((f"#!{python}", "import pathlib, socket, sys, time", control, text)))
        program.chmod(0o700)
        return ProxyWorker(0, [], lambda _: Drain(1), dict(os.environ), lambda: None, 10.0)  # type: ignore[arg-type]

    return make


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the condition never came to hold")


@pytest.mark.parametrize("steps", range(12))
async def test_a_drain_ends_a_process_at_whatever_step_of_its_start(make_worker: MakeWorker, steps: int) -> None:
    """One that has its specification ends by itself, once it has the second command, too; the others are ended."""
    worker = make_worker(
        "stream = control.makefile('rb')\nfor _ in range(2): stream.read(int.from_bytes(stream.read(4), 'little'))"
    )
    try:
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.wait_for(worker.drain(600), 30)
    finally:
        await worker.close(lambda fd: None)


async def test_a_process_that_cannot_be_started_is_tried_again(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec
    failures = [OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))]

    async def fail_once(*arguments: Any, **settings: Any) -> asyncio.subprocess.Process:
        if failures:
            raise failures.pop()
        return await start(*arguments, **settings)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail_once)
    worker = make_worker(f"control.sendall({READY!r})\ntime.sleep(600)")
    try:
        with pytest.raises(StartupError, match="proxy worker 0: cannot be started: Resource temporarily unavailable"):
            await worker.wait_started()
        await until(lambda: worker.ready)
    finally:
        await worker.close(lambda fd: None)


async def test_an_hsm_worker_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipe = os.pipe
    failures = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]
    monkeypatch.setattr(os, "pipe", lambda: make_pipe() if not failures else throw(failures.pop()))
    token = make_soft_token(tmp_path, {"www": KeyType.ECDSA_P256})
    group = WorkerGroup(
        SoftToken(name="local", path=str(token.path), pin_file=str(token.pin_file)), str(tmp_path / "run")
    )
    group.start()
    try:
        await group.wait_ready(30)
    finally:
        await group.stop()


def throw(error: Exception) -> Any:
    raise error


async def test_a_process_that_hangs_before_it_is_ready_is_replaced(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "READY_TIMEOUT_S", 1.0)
    worker = make_worker(
        f"count = pathlib.Path({str(tmp_path)!r}, 'count')\n"
        "count.open('a').write('x')\n"
        f"if count.stat().st_size != 2: control.sendall({READY!r})\n"
        "time.sleep(0 if count.stat().st_size == 1 else 600)"
    )
    try:
        await until(lambda: (tmp_path / "count").exists() and (tmp_path / "count").stat().st_size == 3 and worker.ready)
    finally:
        await worker.close(lambda fd: None)


async def test_the_last_words_of_a_process_are_heard_though_its_end_is(make_worker: MakeWorker) -> None:
    """Both are there when the loop comes to look."""
    words = Status(State.FAILED, "out of luck").to_line()
    worker = make_worker(f"control.sendall({words!r})")
    try:
        while worker.pid is None:  # noqa: ASYNC110 - and nothing after it
            await asyncio.sleep(0)
        while not is_zombie(worker.pid):
            time.sleep(0.01)  # noqa: ASYNC251 - the loop is not to look yet
        with pytest.raises(StartupError, match="proxy worker 0: out of luck"):
            await worker.wait_started()
    finally:
        await worker.close(lambda fd: None)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("came", [True, False], ids=["while stopped", "right after"])
async def test_a_process_is_not_silent_because_this_one_was_stopped(came: bool) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    with theirs:
        reading = asyncio.create_task(read_line(reader, 0.8))
        await asyncio.sleep(0)
        if came:
            theirs.sendall(b"alive\n")
        time.sleep(0.9)  # noqa: ASYNC251 - as a stopped process does
        if not came:
            asyncio.get_running_loop().call_soon(theirs.sendall, b"alive\n")
        assert await reading == b"alive\n"
        with pytest.raises(asyncio.TimeoutError):
            await read_line(reader, 0.01)
        theirs.sendall(b"alive\n")
        assert await read_line(reader, None) == b"alive\n"
    assert await read_line(reader, 10) == b""
    writer.close()
