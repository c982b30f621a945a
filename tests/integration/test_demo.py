"""`tlsproxy demo`: the first thing anybody runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.backends import backend
from tests.proxy import TLSPROXY, free_port, run_to_end


@dataclass
class Demo:
    """A running demo."""

    process: asyncio.subprocess.Process
    output: str
    """What it printed until it was ready."""
    admin_port: int

    async def curl(self, *options: str) -> str:
        """Run the curl line that the demo printed."""
        (line,) = re.findall(r"^ +(curl .*)$", self.output, re.MULTILINE)
        process = await asyncio.create_subprocess_exec(
            *shlex.split(line), "--silent", "--show-error", *options, stdout=-1, stderr=-1
        )
        stdout, stderr = await process.communicate()
        assert process.returncode == 0, stderr
        return stdout.decode()


@contextlib.asynccontextmanager
async def demo(directory: Path, *options: str) -> AsyncIterator[Demo]:
    """Run it until the context ends, then press Ctrl-C."""
    admin_port = free_port()
    ports = ("--port", str(free_port()), "--admin-port", str(admin_port))
    process = await asyncio.create_subprocess_exec(
        *TLSPROXY, "demo", "--dir", str(directory), *ports, *options, stdout=-1, stderr=-1, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    output = ""
    try:
        while "Ctrl-C" not in output:
            line = await asyncio.wait_for(process.stdout.readline(), 60)
            assert line, (await process.stderr.read()).decode()
            output += line.decode()
        yield Demo(process, output, admin_port)
    finally:
        # As a terminal does it: the whole process group gets the signal.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, stderr
    assert b"Traceback" not in stderr


@pytest.mark.parametrize(("key_type", "scheme"), [("ecdsa-p256", "ecdsa"), ("rsa-2048", "rsa_pss")])
async def test_the_line_it_prints_works(tmp_path: Path, key_type: str, scheme: str) -> None:
    async with demo(tmp_path / "demo", "--key-type", key_type, "--workers", "1") as running:
        answer = await running.curl("--verbose")
        assert answer.startswith("Hello from the back end.")
        assert "X-Forwarded-For: 127.0.0.1" in answer
        metrics = await running.curl("--next", f"http://127.0.0.1:{running.admin_port}/metrics")
        assert re.search(rf'tlsproxy_tls_negotiated_total{{.*scheme="{scheme}', metrics)


async def test_a_second_run_finds_what_the_first_has_made(tmp_path: Path) -> None:
    kept = ("ca.pem", "token", "token.pin", "demo-ecdsa-p256.pem")
    async with demo(tmp_path, "--workers", "1"):
        before = contents(tmp_path, kept)
        assert (tmp_path / "token.pin").stat().st_mode & 0o777 == 0o600
    async with demo(tmp_path, "--workers", "1") as running:
        assert contents(tmp_path, kept) == before
        assert "Hello" in await running.curl()


def contents(directory: Path, names: tuple[str, ...]) -> list[bytes]:
    return [(directory / name).read_bytes() for name in names]


async def test_another_key_type_on_a_second_run(tmp_path: Path) -> None:
    for key_type in ("ecdsa-p256", "rsa-2048", "ecdsa-p256"):
        async with demo(tmp_path, "--key-type", key_type, "--workers", "1") as running:
            assert "Hello" in await running.curl()


async def test_a_back_end_of_ones_own(tmp_path: Path) -> None:
    async with backend() as own, demo(tmp_path, "--workers", "1", "--upstream", f"http://127.0.0.1:{own.port}") as it:
        assert await it.curl() == "hello"


async def test_its_configuration_is_sound_and_its_token_damaged_is_one_line(tmp_path: Path) -> None:
    async with demo(tmp_path, "--workers", "1"):
        config = tmp_path / "config.yaml"
        assert await run_to_end("check", str(config)) == (0, f"{config}: sound\n", "")
    (tmp_path / "token").write_text("damaged")
    code, stdout, stderr = await run_to_end("demo", "--dir", str(tmp_path))
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert f"(remove {tmp_path} to start afresh)" in stderr
