"""The measurements against a running proxy: so that they do not rot between two runs of `make bench`."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    make_site(tmp_path, KEYS)
    async with (
        backend(takes_uploads) as upstream,
        running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")) as running,
    ):
        yield running


async def takes_uploads(connection: BackendConnection) -> None:
    """Answer every request once all of its body is there."""
    while head := await connection.head():
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        left = int(length[1]) if length else 0
        while left:
            left -= len(await connection.reader.read(min(left, 1 << 18)))
        await connection.send(ok())


async def start(proxy: Proxy, *words: str) -> asyncio.subprocess.Process:
    where = ["--target", f"127.0.0.1:{proxy.port}", "--server-name", "localhost", "--ca", f"{proxy.directory}/ca.pem"]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perf", *words, *where),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def measure(proxy: Proxy, *words: str) -> dict[str, Any]:
    """Run a subcommand to its end; return the one turn that its raw data has."""
    raw = proxy.directory / "raw.json"
    process = await start(proxy, *words, "--turns", "1", "--seconds", "0.3", "--json", str(raw))
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, errors.decode()
    assert f"127.0.0.1:{proxy.port} |" in output.decode()
    (part,) = json.loads(raw.read_text())
    *_, series = part["turns"].values()
    ((turn,),) = series.values()
    return dict(turn)


@pytest.mark.parametrize(("options", "resumed"), [([], "false"), (["--resumed"], "true")])
async def test_handshakes_are_what_the_proxy_itself_counts(proxy, options, resumed):
    pid = str(proxy.proxy_workers[0])
    turn = await measure(proxy, "handshakes", "--clients", "2", "--pid", pid, *options)
    assert turn["operations"] > 0
    assert turn["failures"] == {}
    assert turn["cpu_s"]["proxy"] > 0
    counted = await proxy.metric("tlsproxy_handshakes_total", result="ok", resumed=resumed)
    assert counted >= turn["operations"]


async def test_requests_are_what_the_proxy_itself_counts(proxy):
    turn = await measure(proxy, "requests", "--rate", "100")
    assert turn["failures"] == {}
    assert 0 < turn["operations"] < 100
    assert await proxy.metric("tlsproxy_http_requests_total", code="200") >= turn["operations"]


async def test_requests_in_http2_are_what_the_proxy_itself_counts(tmp_path):
    make_site(tmp_path, KEYS)
    async with backend(takes_uploads) as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        config["listeners"][0]["http2"] = True
        async with running_proxy(tmp_path, config) as proxy:
            turn = await measure(proxy, "requests", "--http2", "4")
            assert turn["failures"] == {}
            assert sum(turn["latencies"]["counts"].values()) >= turn["operations"] > 0
            assert await proxy.metric("tlsproxy_http_requests_total", code="200") >= turn["operations"]


async def test_uploads_are_what_the_proxy_itself_counts(proxy):
    turn = await measure(proxy, "bulk", "--upload", "--path", "/")
    assert turn["failures"] == {}
    assert turn["operations"] > 0
    assert await proxy.metric("tlsproxy_bytes_total", direction="in") >= turn["operations"] * 1e9


async def test_a_storm_is_probed(proxy):
    turn = await measure(proxy, "storm", "--rate", "50")
    assert 0 < sum(turn["probes"]["counts"].values()) <= turn["probes_asked"]


async def test_control_c_reports_the_turns_until_then(proxy):
    process = await start(proxy, "requests", "--turns", "1000", "--seconds", "0.1")
    await proxy.until(lambda: requests_of(proxy, 200), "requests")
    process.send_signal(signal.SIGINT)
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 130, errors.decode()
    assert "Interrupted: fewer turns than asked for." in output.decode()
    assert b"Traceback" not in errors


async def requests_of(proxy: Proxy, wanted: int) -> bool:
    return await proxy.metric("tlsproxy_http_requests_total", code="200") > wanted


async def test_a_certificate_of_another_ca_is_one_clear_line(proxy, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    make_site(other, KEYS)
    proxy.directory = other
    process = await start(proxy, "requests")
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    assert output == b""
    assert errors.startswith(b"perf: 127.0.0.1:")
    assert b"CERTIFICATE_VERIFY_FAILED" in errors
    assert len(errors.splitlines()) == 1
