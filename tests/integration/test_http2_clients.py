"""Clients that show what HTTP/2 is for: many requests at once on one connection, and an end that loses none."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from selenium import webdriver

from hsm.messages import KeyType
from tests.backends import BackendConnection, backend, ok
from tests.proxy import Proxy, make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}
CLIENTS = Path(__file__).parents[1] / "clients"
SUBRESOURCES = 100


async def application(connection: BackendConnection) -> None:
    """A page with many pictures, and `hello` elsewhere; it answers a body once it has come, with its size."""
    while head := await connection.head():
        path = head.split(b" ")[1]
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length:
            await connection.reader.readexactly(int(length[1]))
            await connection.send(ok(length[1]))
        elif path == b"/page":
            pictures = "".join(f"<img src='/picture/{n}'>" for n in range(SUBRESOURCES))
            await connection.send(ok(f"<!doctype html><title>page</title>{pictures}".encode()))
        elif path.startswith(b"/picture/"):
            await asyncio.sleep(0.02)
            await connection.send(ok(b"<svg xmlns='http://www.w3.org/2000/svg'/>"))
        else:
            await connection.send(ok())


@contextlib.asynccontextmanager
async def site(directory: Path, **changes: Any) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    async with backend(application) as app:
        config = site_config(directory, KEYS, f"127.0.0.1:{app.port}", **{"log": {"level": "warning"}, **changes})
        config["listeners"][0]["http2"] = True
        async with running_proxy(directory, config) as proxy:
            yield proxy


async def run(*command: str) -> str:
    """Run a client to its end; return what it wrote to stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_h2load_gets_every_answer(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        output = await run("h2load", "-n", "3000", "-c", "3", "-m", "100", f"https://localhost:{proxy.port}/")
        assert "Application protocol: h2\n" in output
        assert "3000 succeeded, 0 failed, 0 errored, 0 timeout" in output
        assert await proxy.metric("tlsproxy_http_requests_total", code="200") == 3000
        assert await proxy.metric("tlsproxy_connections_accepted_total") == 3


async def test_h2load_gets_its_uploads_through(tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(bytes(1_000_000))
    async with site(tmp_path) as proxy:
        output = await run(
            "h2load", "-n", "60", "-c", "2", "-m", "30", "-d", str(body), f"https://localhost:{proxy.port}/"
        )
        assert "60 succeeded, 0 failed, 0 errored, 0 timeout" in output


async def test_nghttp_reads_heads_bodies_and_trailers(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        output = await run("nghttp", "-v", "--no-verify-peer", "-m", "20", f"https://localhost:{proxy.port}/")
        assert output.count(":status: 200\n") == 20
        assert output.count("hello") == 20
        assert "INVALID" not in output
        assert await proxy.metric("tlsproxy_connections_accepted_total") == 1


async def test_a_browser_loads_a_page_with_all_its_pictures_over_one_connection(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        seen = await asyncio.to_thread(_load_page, proxy.port, tmp_path)
        assert seen == ["h2"] * (SUBRESOURCES + 1)
        assert await proxy.metric("tlsproxy_http_requests_total", code="200") >= SUBRESOURCES + 1
        # Chromium opens a second one now and then, in case the first is slow.
        assert await proxy.metric("tlsproxy_connections_accepted_total") <= 2


def _load_page(port: int, directory: Path) -> list[str]:
    """Return the protocol of the page and of each picture in it."""
    options = webdriver.ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--ignore-certificate-errors",
        f"--user-data-dir={directory / 'chromium'}",
    ):
        options.add_argument(flag)
    options.binary_location = "/usr/bin/chromium"
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        driver.set_page_load_timeout(30)
        driver.get(f"https://localhost:{port}/page")
        script = """
            const entries = ["navigation", "resource"].flatMap((type) => performance.getEntriesByType(type));
            return entries.filter(({ name }) => /page|picture/.test(name)).map((entry) => entry.nextHopProtocol);
        """
        found: list[str] = driver.execute_script(script)
        return found
    finally:
        driver.quit()


@contextlib.asynccontextmanager
async def steady_load(proxy: Proxy) -> AsyncIterator[dict[str, Any]]:
    """Requests in HTTP/2 while it lasts; what the client has seen is there at its end."""
    process = await asyncio.create_subprocess_exec(
        "node",
        str(CLIENTS / "http2_load.mjs"),
        str(proxy.port),
        str(proxy.directory / "ca.pem"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    seen: dict[str, Any] = {}
    try:
        yield seen
    finally:
        output, _ = await asyncio.wait_for(process.communicate(b""), 60)
        seen.update(json.loads(output))


async def answered(proxy: Proxy, count: float) -> bool:
    return await proxy.metric("tlsproxy_http_requests_total", code="200") >= count


async def test_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    async with site(tmp_path, workers=2) as proxy:
        async with steady_load(proxy) as seen:
            for count in range(1, 6):
                before = await proxy.metric("tlsproxy_http_requests_total", code="200")
                proxy.process.send_signal(signal.SIGHUP)
                await proxy.until(lambda count=count: reloaded(proxy, count), f"reload {count}")
                await proxy.until(lambda before=before: answered(proxy, before + 200), "requests go on")
        assert (seen["failures"], seen["refused"]) == ([], 0)
        assert seen["answered"] >= 1000
        assert 6 <= seen["connections"] <= 12


async def reloaded(proxy: Proxy, count: int) -> bool:
    return await proxy.metric("tlsproxy_config_reloads_total", result="success") == count


async def test_the_end_under_load_loses_no_request(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy, steady_load(proxy) as seen:
        await proxy.until(lambda: answered(proxy, 200), "requests are served")
        assert await proxy.stop() == 0
    assert seen["failures"] == []
    assert seen["answered"] >= 200
