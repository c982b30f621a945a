"""`tlsproxy top` on a real proxy, in a real terminal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hsm.messages import KeyType
from tests.proxy import TLSPROXY, free_port, make_site, run_to_end, running_proxy, site_config
from tlsproxy import top
from tlsproxy.errors import StartupError

KEYS = {"www": KeyType.ECDSA_P256}


class Terminal:
    """`tlsproxy top` on a pseudo-terminal."""

    def __init__(self, descriptor: int, process: asyncio.subprocess.Process) -> None:
        self._descriptor = descriptor
        self.process = process
        self.output = ""

    def receive(self) -> None:
        with contextlib.suppress(OSError):
            self.output += os.read(self._descriptor, 65536).decode()

    def end(self, how: str) -> None:
        if how == "q":
            os.write(self._descriptor, b"q")
        else:
            self.process.send_signal(signal.SIGINT)

    async def shows(self, words: str) -> None:
        for _ in range(300):
            if words in self.output:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never {words!r}: {self.output[-2000:]}")

    def settings(self) -> list[object]:
        return list(termios.tcgetattr(self._descriptor))


@contextlib.asynccontextmanager
async def running_top(port: int) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
    process = await asyncio.create_subprocess_exec(
        *TLSPROXY, "top", "--admin", f"http://127.0.0.1:{port}", stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    terminal = Terminal(ours, process)
    asyncio.get_running_loop().add_reader(ours, terminal.receive)
    try:
        yield terminal
    finally:
        asyncio.get_running_loop().remove_reader(ours)
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)


@pytest.mark.parametrize("how", ["q", "SIGINT"])
async def test_it_shows_the_state_over_a_restart_and_gives_the_terminal_back(tmp_path: Path, how: str) -> None:
    make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, "127.0.0.1:9")
    async with contextlib.AsyncExitStack() as stack:
        async with running_proxy(tmp_path, config) as proxy:
            terminal = await stack.enter_async_context(running_top(proxy.admin_port))
            before = terminal.settings()
            await terminal.shows("1 of 1 proxy workers")
            await proxy.handshake()
            await terminal.shows("ecdsa_secp256r1_sha256")
        await terminal.shows("Reconnecting")
        terminal.output = ""
        async with running_proxy(tmp_path, config):
            await terminal.shows("1 of 1 proxy workers")
            assert terminal.settings() != before
            terminal.end(how)
            assert await asyncio.wait_for(terminal.process.wait(), 30) == 0
            await terminal.shows("\x1b[?25h\x1b[?1049l")
            assert terminal.settings() == before
            assert "Traceback" not in terminal.output


async def test_once_prints_anywhere(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
        code, output, errors = await run_to_end("top", "--once", "--admin", f"http://127.0.0.1:{proxy.admin_port}")
    assert (code, errors) == (0, "")
    assert "1 of 1 proxy workers" in output
    assert "\x1b" not in output


async def serve(reply: bytes) -> asyncio.Server:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "got no HTTP response"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "got status 404 for /live"),
        (OK + b"data: {]\n\n", "got an event that is not JSON"),
        (OK + b"data: {}\n\n", "got the status of another version"),
        (OK + b"data: []\n\n", "got the status of another version"),
        (OK + b"data: " + b"x" * (1 << 20) + b"x", "got an event of more than 1048576 bytes"),
        (OK, "no answer"),
    ],
)
async def test_what_is_no_admin_port_is_one_clear_line(reply: bytes, words: str) -> None:
    server = await serve(reply)
    async with server:
        with pytest.raises(StartupError, match=re.escape(words)) as raised:
            await top.run("127.0.0.1", server.sockets[0].getsockname()[1], once=True)
    assert str(raised.value).count("\n") == 0


async def test_nobody_there_is_one_clear_line() -> None:
    port = free_port()
    code, _, errors = await run_to_end("top", "--once", "--admin", f"http://127.0.0.1:{port}")
    assert (code, errors) == (1, f"tlsproxy: cannot reach the admin port at 127.0.0.1:{port}: Connection refused\n")


async def test_no_terminal_is_one_clear_line() -> None:
    code, _, errors = await run_to_end("top")
    assert (code, errors) == (1, "tlsproxy: top: expected a terminal; with --once it prints anywhere\n")
