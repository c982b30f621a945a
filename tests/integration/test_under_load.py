"""Under a steady load processes die, hang, or are told to end: no client loses a request by it but those that must."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from tests.backends import backend
from tests.load import steady_load
from tests.proxy import Proxy, log_events, make_site, run_to_end, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}


@contextlib.asynccontextmanager
async def site(directory: Path, *, hsm_workers: int = 1, **changes: Any) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    async with backend() as upstream:
        # On a machine with other work to do, one that is only slow is not to be held to hang.
        quiet = {"log": {"level": "warning"}, "hang_timeout": "60s"}
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", **{**quiet, **changes})
        config["hsm"]["tokens"][0]["workers"] = hsm_workers
        async with running_proxy(directory, config) as proxy:
            yield proxy


async def test_a_proxy_worker_killed_breaks_its_own_connections_only(tmp_path: Path) -> None:
    async with site(tmp_path, workers=2) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        victim = proxy.proxy_workers[0]
        os.kill(victim, signal.SIGSTOP)
        await proxy.until(lambda: is_stopped(victim), "stopped")
        own = client_ports(victim, proxy.port)
        before = await counters(proxy)
        os.kill(victim, signal.SIGKILL)
        await proxy.until(lambda: len(proxy.proxy_workers) == 2 and victim not in proxy.proxy_workers, "replaced")
        await load.until_answered(50)
        assert {port for port, _ in load.failures} <= own
        after = await counters(proxy)
        assert all(after[name] >= count for name, count in before.items())


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def client_ports(pid: int, port: int) -> set[int]:
    """Return the clients' ports of the connections to `port` that a process holds."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, *rest = line.split()
        if int(local.partition(":")[2], 16) == port and rest[5] in inodes:
            found.add(int(remote.partition(":")[2], 16))
    return found


async def counters(proxy: Proxy) -> dict[str, float]:
    names = ("tlsproxy_handshakes_total", "tlsproxy_http_requests_total", "hsm_sign_requests_total")
    return {name: await proxy.metric(name) for name in names}


async def test_an_hsm_worker_killed_is_noticed_by_no_client(tmp_path: Path) -> None:
    async with site(tmp_path, hsm_workers=2) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        for _ in range(3):
            victim = proxy.hsm_workers[0]
            os.kill(victim, signal.SIGKILL)
            await proxy.until(lambda gone=victim: len({*proxy.hsm_workers} - {gone}) == 2, "replaced")
            await load.until_answered(20)
        assert load.failures == []


async def test_a_proxy_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with site(tmp_path, hang_timeout="4s") as proxy:
        (victim,) = proxy.proxy_workers
        os.kill(victim, signal.SIGSTOP)
        await proxy.until(lambda: set(proxy.proxy_workers) - {victim}, "another one")
        assert await proxy.get() == (200, b"hello")
        assert "proxy worker hangs" in [event["event"] for event in log_events(proxy.log)]
        assert await proxy.metric("tlsproxy_worker_restarts_total") == 1


async def test_an_hsm_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    async with site(tmp_path, hang_timeout="4s") as proxy:
        (victim,) = proxy.hsm_workers
        os.kill(victim, signal.SIGSTOP)
        await proxy.until(lambda: set(proxy.hsm_workers) - {victim}, "another one")
        assert "gave no sign of life for 4 s" in proxy.log
        await proxy.until(lambda: is_ready(proxy), "ready again")
        assert await proxy.get() == (200, b"hello")


async def is_ready(proxy: Proxy) -> bool:
    return (await proxy.admin("/readyz"))[0] == 200


async def test_drain_under_load_loses_no_request_and_ends_the_proxy(tmp_path: Path) -> None:
    async with site(tmp_path, workers=2) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        load.stopped_accepting = True
        assert await run_to_end("drain", "--runtime-dir", str(tmp_path / "run")) == (0, "", "")
        assert await proxy.process.wait() == 0
        assert load.failures == []
        assert load.answered > 0
