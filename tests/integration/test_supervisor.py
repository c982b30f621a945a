"""Processes die; clients are served. HSM workers and proxy workers are killed under the whole product."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import re
import signal
import ssl
import struct
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import Proxy, make_site, running_proxy, site_config
from tlsproxy.serve.anatomy import PHASES

KEYS = {"www": KeyType.ECDSA_P256}


@contextlib.asynccontextmanager
async def site(directory: Path, *, hsm_workers: int = 1, **changes: Any) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    async with backend() as upstream:
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", **changes)
        config["hsm"]["tokens"][0]["workers"] = hsm_workers
        async with running_proxy(directory, config) as proxy:
            yield proxy


def send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def test_an_hsm_worker_killed_mid_handshake_is_noticed_by_no_client(tmp_path: Path) -> None:
    async with site(tmp_path, hsm_workers=2) as proxy:
        first, second = proxy.hsm_workers
        send(signal.SIGSTOP, (first, second))
        handshakes = [asyncio.create_task(proxy.handshake()) for _ in range(20)]
        await proxy.until(lambda: has_pending(proxy, 20), "20 signatures pending")
        send(signal.SIGKILL, [first])
        send(signal.SIGCONT, [second])
        assert await asyncio.gather(*handshakes) == ["TLSv1.3"] * 20
        assert await proxy.metric("tlsproxy_handshakes_total", result="ok") == 20
        assert await proxy.metric("hsm_retries_total") > 0
        await proxy.until(lambda: len(proxy.hsm_workers) == 2, "the worker replaced")


async def has_pending(proxy: Proxy, count: int) -> bool:
    return await proxy.metric("hsm_pending", token="local") == count


async def test_without_any_hsm_worker_clients_get_an_alert_and_it_recovers_by_itself(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        assert await proxy.get() == (200, b"hello")
        async with established(proxy) as request:
            killing = asyncio.create_task(keep_killing(proxy))
            try:
                await proxy.until(lambda: is_ready(proxy, 503), "not ready")
                await proxy.until(lambda: gets_alert(proxy), "a handshake refused at once")
                assert (await proxy.admin("/healthz"))[0] == 200
                assert b"200 OK" in await request()
            finally:
                killing.cancel()
            await proxy.until(lambda: is_ready(proxy, 200), "ready again")
            assert await proxy.get() == (200, b"hello")
            assert b"200 OK" in await request()
        assert await proxy.metric("tlsproxy_handshakes_total", result="hsm_unavailable") >= 1
        assert await proxy.metric("tlsproxy_worker_restarts_total") == 0


async def keep_killing(proxy: Proxy) -> None:
    while True:
        send(signal.SIGKILL, await asyncio.to_thread(lambda: proxy.hsm_workers))
        await asyncio.sleep(0.005)


async def is_ready(proxy: Proxy, status: int) -> bool:
    return (await proxy.admin("/readyz"))[0] == status


async def gets_alert(proxy: Proxy) -> bool:
    """A handshake ends with an alert, not with a connection that is merely cut."""
    try:
        await proxy.handshake()
    except ssl.SSLError as error:
        return error.reason == "TLSV1_ALERT_INTERNAL_ERROR"
    return False


@contextlib.asynccontextmanager
async def established(proxy: Proxy) -> AsyncIterator[Any]:
    """Yield a function that makes a request on one established connection and returns the response's head."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", proxy.port, ssl=proxy.client_context(), server_hostname="localhost"
    )

    async def request() -> bytes:
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(5) == b"hello"
        return head

    try:
        yield request
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_a_proxy_worker_killed_is_replaced_and_no_count_is_lost(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        for _ in range(10):
            assert await proxy.get() == (200, b"hello")
        before = await counters(proxy)
        assert before["tlsproxy_handshakes_total"] == 10
        (worker,) = proxy.proxy_workers
        async with established(proxy) as request:
            assert b"200 OK" in await request()
            os.kill(worker, signal.SIGKILL)
            await proxy.until(lambda: worker not in proxy.proxy_workers, "the worker gone")
            # The listening socket outlives the worker: a client that comes meanwhile waits, and is served.
            assert await proxy.get() == (200, b"hello")
        assert proxy.proxy_workers != [worker]
        after = await counters(proxy)
        assert all(after[name] >= count for name, count in before.items())
        assert after["tlsproxy_handshakes_total"] == 12
        assert await proxy.metric("tlsproxy_worker_restarts_total") == 1
        await proxy.until(lambda: has_connections(proxy, 0), "the last connection closed")


async def has_connections(proxy: Proxy, count: int) -> bool:
    return await proxy.metric("tlsproxy_connections") == count


async def counters(proxy: Proxy) -> dict[str, float]:
    names = ("tlsproxy_handshakes_total", "tlsproxy_http_requests_total", "hsm_sign_requests_total")
    return {name: await proxy.metric(name) for name in names}


async def test_health_and_gauges_follow_the_proxy_workers(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        (worker,) = proxy.proxy_workers
        async with established(proxy) as request:
            assert b"200 OK" in await request()
            assert await proxy.metric("tlsproxy_connections") == 1
            os.kill(worker, signal.SIGKILL)
            await proxy.until(lambda: is_healthy(proxy, 503), "unhealthy")
            await proxy.until(lambda: has_connections(proxy, 0), "the dead worker's connections gone")
            assert proxy.proxy_workers != [worker]
        await proxy.until(lambda: is_healthy(proxy, 200), "healthy again")


async def test_a_proxy_worker_that_spoils_its_metrics_can_be_replaced_all_the_same(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        (worker,) = proxy.proxy_workers
        spoil_metrics(worker)
        assert await proxy.metric("tlsproxy_workers_ready") == 1
        os.kill(worker, signal.SIGKILL)
        await proxy.until(lambda: is_healthy(proxy, 503), "unhealthy")
        await proxy.until(lambda: is_healthy(proxy, 200), "healthy again")
        assert await proxy.get() == (200, b"hello")
        assert await proxy.metric("tlsproxy_handshakes_total", result="ok") == 1


def spoil_metrics(pid: int) -> None:
    store, *_ = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "hsm-metrics" in os.readlink(fd)]
    with store.open("r+b") as file:
        file.write(b"\xff" * 64)


async def test_a_proxy_worker_that_counts_without_measure_takes_no_answer_from_the_admin_port(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        await proxy.handshake()
        overstate(proxy.proxy_workers[0], "tlsproxy_handshakes_total")
        for page in ("/healthz", "/readyz", "/metrics"):
            assert (await proxy.admin(page))[0] == 200


def overstate(pid: int, family: str) -> None:
    """Set all of a process's counters of a family to the largest number that there is."""
    store, *_ = [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "hsm-metrics" in os.readlink(fd)]
    with store.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as memory:
        slots = [int(slot) for slot in re.findall(rb'\["%b", \[[^]]*\], ([0-9]+),' % family.encode(), memory)]
        assert len(slots) > 1
        for slot in slots:
            struct.pack_into("d", memory, 64 + 8 * slot, sys.float_info.max)


async def is_healthy(proxy: Proxy, status: int) -> bool:
    return (await proxy.admin("/healthz"))[0] == status


async def test_the_metrics_of_all_workers_are_one_page(tmp_path: Path) -> None:
    async with site(tmp_path, workers=2) as proxy:
        assert len(proxy.proxy_workers) == 2
        await asyncio.gather(*(proxy.handshake() for _ in range(40)))
        assert await proxy.metric("tlsproxy_handshakes_total", result="ok", tls_version="TLSv1.3") == 40
        phases = {
            phase: await proxy.metric("tlsproxy_handshake_phase_duration_seconds_sum", phase=phase) for phase in PHASES
        }
        assert all(seconds > 0 for seconds in phases.values())
        total = await proxy.metric("tlsproxy_handshake_duration_seconds_sum")
        assert sum(phases.values()) == pytest.approx(total, rel=1e-6)
        assert await proxy.metric("hsm_sign_requests_total", token="local", result="ok") == 40
        assert await proxy.metric("tlsproxy_workers_ready") == 2
        status, page = await proxy.admin("/")
        assert status == 200
        assert b"<title>tlsproxy</title>" in page
