"""What a worker can still do once it is confined by Landlock: tried from inside real workers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType, SignatureScheme, SignRequest, Status
from tests.backends import backend
from tests.implant import ATTEMPTS, SPY, Implants
from tests.proxy import Proxy, log_events, make_site, run_to_end, running_proxy, site_config
from tests.tokens import CERTIFICATE_VERIFY, WorkerClient, deadline_in, make_soft_token, soft_worker
from tlsproxy.serve.command_socket import key_file

KEYS = {"www": KeyType.ECDSA_P256}
REFUSED_SINCE = {
    1: dict.fromkeys(("read", "write", "list", "unlink", "passwd", "execute"), errno.EACCES),
    4: dict.fromkeys(("bind", "connect"), errno.EACCES),
    6: {"signal": errno.EPERM},
}
"""What is refused, by the version of Landlock from which on it is."""


@pytest.fixture
def implants(tmp_path: Path) -> Iterator[Implants]:
    with contextlib.closing(Implants(tmp_path)) as implants:
        yield implants


async def attempts(implants: Implants, pid: int, secret: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the attempts in a process came to, and what they come to where this kernel refuses all it can."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        call = f"landlock_version(), attempts({str(secret)!r}, {server.getsockname()[1]})"
        abi, results = await asyncio.to_thread(implants.evaluate, pid, ATTEMPTS, f"({call})")
    refused = dict.fromkeys(results, "done")
    for since, refusals in REFUSED_SINCE.items():
        refused |= refusals if abi >= since else {}
    return results, refused


async def test_from_inside_a_soft_tokens_worker_no_file_no_network_and_no_process_can_be_reached(
    tmp_path: Path, implants: Implants, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in implants.environment.items():
        monkeypatch.setenv(name, value)
    files = make_soft_token(tmp_path, KEYS)
    with soft_worker(tmp_path, files) as worker:
        for secret in (files.pin_file, files.path):
            results, refused = await attempts(implants, worker.process.pid, secret)
            assert results == refused
        with WorkerClient(worker.socket_path) as client:
            request = SignRequest(1, 0, SignatureScheme.ECDSA_SECP256R1_SHA256, deadline_in(30), CERTIFICATE_VERIFY)
            assert client.ask(request)[0].status is Status.OK


@contextlib.asynccontextmanager
async def proxy_with_implants(directory: Path, implants: Implants, server: str) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    async with backend() as upstream:
        config = site_config(directory, KEYS, f"{server}:{upstream.port}", workers=2)
        async with running_proxy(directory, config, implants.environment) as proxy:
            assert await proxy.get() == (200, b"hello")
            yield proxy


@pytest.mark.parametrize("server", ["localhost", "127.0.0.1"])
async def test_from_inside_a_proxy_worker_it_reads_its_program_connects_to_servers_and_no_more(
    tmp_path: Path, implants: Implants, server: str
) -> None:
    async with proxy_with_implants(tmp_path, implants, server) as proxy:
        (worker, _) = proxy.proxy_workers
        results, refused = await attempts(implants, worker, tmp_path / "token.pin")
        if server == "localhost":
            refused["passwd"] = "done"
        assert results == refused
        port = proxy.config["upstreams"][0]["servers"][0]["address"].rpartition(":")[2]
        connects = await asyncio.to_thread(implants.evaluate, worker, ATTEMPTS, f"attempt(lambda: connect({port}))")
        assert connects == "done"
        assert await proxy.get() == (200, b"hello")


async def test_from_inside_a_proxy_worker_no_other_worker_can_be_looked_into(
    tmp_path: Path, implants: Implants
) -> None:
    async with proxy_with_implants(tmp_path, implants, "127.0.0.1") as proxy:
        spy, sibling = proxy.proxy_workers
        has_landlock = await asyncio.to_thread(implants.evaluate, spy, ATTEMPTS, "landlock_version() >= 1")
        for victim in (sibling, *proxy.hsm_workers, proxy.process.pid):
            results = await asyncio.to_thread(implants.evaluate, spy, SPY, f"spy({victim})")
            is_kept_out = set(results.values()) <= {errno.EPERM, errno.EACCES}
            assert is_kept_out or not has_landlock, results
        assert "done" in spied_from_outside(sibling).values()


COMMAND = """
import json, socket

def command(path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(b'{"command": "hand_over"}\\n')
        return json.loads(connection.recv(4096))["ok"]
"""


async def test_from_inside_a_proxy_worker_the_supervisor_takes_no_command(tmp_path: Path, implants: Implants) -> None:
    async with proxy_with_implants(tmp_path, implants, "127.0.0.1") as proxy:
        path = tmp_path / "run" / "control.sock"
        (worker, _) = proxy.proxy_workers
        assert await asyncio.to_thread(implants.evaluate, worker, COMMAND, f"command({str(path)!r})") is False
        results, refused = await attempts(implants, worker, key_file(path))
        assert results["read"] == refused["read"]
        assert (await run_to_end("status", "--runtime-dir", str(tmp_path / "run")))[0] == 0


async def test_a_proxy_workers_loop_has_a_descriptor_to_spare(tmp_path: Path, implants: Implants) -> None:
    async with proxy_with_implants(tmp_path, implants, "127.0.0.1") as proxy:
        process = Path(f"/proc/{proxy.proxy_workers[0]}")
        nulls = [path.name for path in (process / "fd").iterdir() if os.readlink(path) == os.devnull]
        # Others of its descriptors lead there too, but those can be written to.
        flags = [(process / "fdinfo" / name).read_text().split()[3] for name in nulls]
        assert [flag for flag in flags if int(flag, 8) & os.O_ACCMODE == os.O_RDONLY]


def spied_from_outside(pid: int) -> dict[str, Any]:
    """Look into a process from one of the same user that is not confined: this shows that the spy can succeed."""
    spy = [sys.executable, "-c", f"{SPY}\nprint(json.dumps(spy({pid})))"]
    results: dict[str, Any] = json.loads(subprocess.run(spy, capture_output=True, text=True, check=True).stdout)
    return results


async def test_workers_say_whether_they_are_confined(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
        said = {event["process"]: event for event in log_events(proxy.log) if "confined" in event["event"]}
        assert said.keys() == {"proxy-0", "hsm-worker-local"}
        for event in said.values():
            assert (event["event"] == "confined") == (event["landlock"] > 0)
