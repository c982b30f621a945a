"""`tlsproxy run`: what keeps it from starting is one clear line, and it ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import resource
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import (
    TLSPROXY,
    Proxy,
    free_port,
    log_events,
    make_site,
    run_to_end,
    running_proxy,
    site_config,
    write_config,
)
from tests.tokens import SoftTokenFiles
from tlsproxy.serve.anatomy import PHASES

KEYS = {"www": KeyType.ECDSA_P256}

Change = Callable[[Path, SoftTokenFiles, dict[str, Any]], None]


def corrupt_token(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    content = bytearray(token.path.read_bytes())
    content[len(content) // 2] ^= 1
    token.path.write_bytes(content)


def wrong_pin(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    token.pin_file.write_text("wrong\n")


def unknown_key(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    config["certificates"][0]["key"] = "web"


def another_certificate(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    other = directory / "other"
    other.mkdir()
    make_site(other, {"other": KeyType.ECDSA_P256})
    (directory / "www.pem").write_bytes((other / "other.pem").read_bytes())


def no_certificate(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    (directory / "www.pem").unlink()


def key_in_certificate(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    with (directory / "www.pem").open("a") as file:
        file.write("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")


def open_pin_file(directory: Path, token: SoftTokenFiles, config: dict[str, Any]) -> None:
    token.pin_file.chmod(0o644)


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        (corrupt_token, "hsm.tokens[0].path", ("damaged",)),
        (wrong_pin, "hsm.tokens[0].path", ("the PIN is wrong",)),
        (open_pin_file, "hsm.tokens[0].path", ("mode 0600", "0644")),
        (unknown_key, "certificates[0].key", ("(www)", "got 'web'")),
        (another_certificate, "certificates[0].key", ("www.pem", "another one", "'local'")),
        (no_certificate, "certificates[0].chain_file", ("www.pem", "No such file")),
        (key_in_certificate, "certificates[0].chain_file", ("keys belong in the token",)),
    ],
)
async def test_a_set_up_that_does_not_fit_is_one_line_and_exit_2(
    tmp_path: Path, change: Change, place: str, words: tuple[str, ...]
) -> None:
    token = make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, "127.0.0.1:9")
    change(tmp_path, token, config)
    file = write_config(tmp_path, config)
    code, _, stderr = await run_to_end("run", "--config", str(file))
    (line,) = [line for line in stderr.splitlines() if line.startswith(f"{file}:")]
    assert code == 2
    assert f": {place}: " in line
    for word in words:
        assert word in line
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "local-0.sock").exists()


@pytest.mark.parametrize("which", ["listeners[0]", "admin"])
async def test_a_port_in_use_is_one_line_and_exit_1(tmp_path: Path, which: str) -> None:
    make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, "127.0.0.1:9")
    address = config["admin"]["address"] if which == "admin" else config["listeners"][0]["address"]
    with socket.socket() as occupant:
        # The meanest of occupants: it would share the port.
        occupant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        occupant.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        occupant.listen()
        code, _, stderr = await run_to_end("run", "--config", str(write_config(tmp_path, config)))
    assert (code, stderr) == (1, f"tlsproxy: {which}: cannot listen on {address}: the port is in use\n")


async def test_a_second_instance_does_not_take_the_sockets_of_the_first(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, "127.0.0.1:9")
    async with running_proxy(tmp_path, config) as proxy:
        other = {**config, "listeners": [{**config["listeners"][0], "address": f"127.0.0.1:{free_port()}"}]}
        del other["admin"]
        second = tmp_path / "second.yaml"
        write_config(tmp_path, other).rename(second)
        code, _, stderr = await run_to_end("run", "--config", str(second))
        assert code == 1
        assert stderr == f"tlsproxy: runtime_dir: {tmp_path / 'run'} is in use by another tlsproxy\n"
        assert await proxy.handshake() == "TLSv1.3"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_request_under_way_is_finished_before_the_end(tmp_path: Path, number: signal.Signals) -> None:
    make_site(tmp_path, KEYS)
    arrived, may_answer = asyncio.Event(), asyncio.Event()

    async def slow(connection: BackendConnection) -> None:
        await connection.head()
        arrived.set()
        await may_answer.wait()
        await connection.send(ok(b"late"))

    async with backend(slow) as upstream:
        async with running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")) as proxy:
            request = asyncio.create_task(proxy.get())
            await arrived.wait()
            proxy.process.send_signal(number)
            await proxy.until(lambda: "draining" in proxy.log, "draining")
            await proxy.until(lambda: refuses(proxy.port), "no more accepted")
            assert proxy.process.returncode is None
            may_answer.set()
            assert await request == (200, b"late")
            assert await asyncio.wait_for(proxy.process.wait(), 30) == 0
        assert log_events(proxy.log)[-1]["event"] == "stopped"
        assert not list((tmp_path / "run").rglob("*.sock"))


async def refuses(port: int) -> bool:
    """Nothing accepts on the port: the connection is refused, or ends at once."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return True
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        ended = await asyncio.wait_for(reader.read(1), 0.2) == b""
        writer.close()
        return ended
    writer.close()
    return False


async def test_a_second_signal_cuts_off_what_is_under_way(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    arrived = asyncio.Event()

    async def never(connection: BackendConnection) -> None:
        await connection.head()
        arrived.set()
        await asyncio.Event().wait()

    async with backend(never) as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}", drain_timeout="1h")
        async with running_proxy(tmp_path, config) as proxy:
            request = asyncio.create_task(proxy.get())
            await arrived.wait()
            proxy.process.send_signal(signal.SIGTERM)
            await proxy.until(lambda: "draining" in proxy.log, "draining")
            proxy.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(proxy.process.wait(), 30) == 0
            with pytest.raises((ConnectionError, ssl.SSLError)):
                await request


async def test_no_process_outlives_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9", workers=2)) as proxy:
        children = [*proxy.proxy_workers, *proxy.hsm_workers]
        assert len(children) == 3
        proxy.process.kill()
        await proxy.process.wait()
        await proxy.until(lambda: not any(map(is_running, children)), "all children gone")


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie that nobody has waited for yet."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_proxy_workers_may_have_as_many_descriptors_as_the_system_allows(tmp_path: Path) -> None:
    """And nobody else: some PKCS#11 libraries use select(2), which ends at 1024."""
    make_site(tmp_path, KEYS)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    inherited = hard - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (inherited, hard))
    try:
        async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
            ((worker,), (hsm_worker,)) = proxy.proxy_workers, proxy.hsm_workers
            assert resource.prlimit(worker, resource.RLIMIT_NOFILE) == (hard, hard)
            assert resource.prlimit(hsm_worker, resource.RLIMIT_NOFILE) == (inherited, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_runtime_files_are_closed_to_others(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")):
        modes = {
            re.sub("^hsm-[0-9-]+", "hsm", str(path.relative_to(tmp_path / "run"))): oct(path.stat().st_mode & 0o777)
            for path in (tmp_path / "run").rglob("*")
        }
        ours = dict.fromkeys(("lock", "control.sock", "control.key", "hsm/local-0.sock"), "0o600")
        assert modes == ours | {"hsm": "0o700"}
        assert os.stat(tmp_path / "run").st_mode & 0o777 == 0o700


async def test_no_worker_shares_the_terminal_of_who_started_the_proxy(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    # The first terminal that the leader of a session opens becomes its controlling one.
    code = "import os, sys; os.setsid(); os.open(sys.argv[1], os.O_RDWR); os.execvp(sys.argv[2], sys.argv[2:])"
    ours, theirs = os.openpty()
    launcher = (sys.executable, "-c", code, os.ttyname(theirs))
    try:
        async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9"), launcher=launcher) as proxy:
            assert controlling_terminal(proxy.process.pid)
            assert not any(map(controlling_terminal, (*proxy.proxy_workers, *proxy.hsm_workers)))
    finally:
        os.close(ours)
        os.close(theirs)


def controlling_terminal(pid: int) -> int:
    """Return the device of a process's controlling terminal, 0 if it has none (proc(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4])


async def test_each_request_and_each_handshake_is_a_line(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        async with running_proxy(tmp_path, config) as proxy:
            assert await proxy.get("/a?b=c") == (200, b"hello")
            await proxy.stop()
        events = {event["event"]: event for event in log_events(proxy.log)}
        request, handshake = events["request"], events["handshake"]
        assert (request["target"], request["status"], request["client"]) == ("/a?b=c", 200, "127.0.0.1")
        assert (handshake["result"], handshake["token"]) == ("ok", "local")
        assert handshake["scheme"] == "ecdsa_secp256r1_sha256"
        phases = sum(handshake[f"{phase}_s"] for phase in PHASES)
        assert phases == pytest.approx(handshake["duration_s"], abs=1e-5)


async def test_the_line_of_a_request_that_failed_says_why(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{free_port()}")) as proxy:
        assert (await proxy.get("/"))[0] == 502
        await proxy.stop()
    (request,) = [event for event in log_events(proxy.log) if event["event"] == "request"]
    assert (request["status"], request["reason"]) == (502, "connect_failed")


async def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}", drain_timeout="1s")
        process = await asyncio.create_subprocess_exec(
            *TLSPROXY, "run", "--config", str(write_config(tmp_path, config)), stderr=writer
        )
        os.close(writer)
        proxy = Proxy(tmp_path, config, process)
        (tmp_path / "stderr").touch()
        try:
            await proxy.until(lambda: answers(proxy), "an answer")
            for _ in range(40):
                assert await proxy.get() == (200, b"hello")
        finally:
            assert await proxy.stop() == 0
            os.close(reader)


async def answers(proxy: Proxy) -> bool:
    with contextlib.suppress(OSError):
        return await proxy.get() == (200, b"hello")
    return False
