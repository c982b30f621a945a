"""What operators and service managers ask of a proxy that is still starting."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import TLSPROXY, Proxy, make_site, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


@contextlib.asynccontextmanager
async def starting(directory: Path, config: dict[str, object], *options: str) -> AsyncIterator[Proxy]:
    """Start a proxy that does not get further than to its token: its HSM worker is stopped."""
    with (directory / "stderr").open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *TLSPROXY, "run", "--config", str(write_config(directory, config)), *options, stderr=stderr
        )
    proxy = Proxy(directory, config, process)
    try:
        while not (found := proxy.hsm_workers):  # noqa: ASYNC110 - it opens its token in a moment
            await asyncio.sleep(0.001)
        os.kill(found[0], signal.SIGSTOP)
        yield proxy
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[0], signal.SIGCONT)
        await proxy.stop()


async def told_to_end(proxy: Proxy) -> int:
    """Have a proxy that starts end, and let its HSM worker go on when that has been told, too; return the exit code."""
    (worker,) = proxy.hsm_workers
    proxy.process.send_signal(signal.SIGTERM)
    await proxy.until(lambda: is_pending(worker, signal.SIGTERM), "the worker told")
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGCONT)
    return await asyncio.wait_for(proxy.process.wait(), 30)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has been sent a signal and is stopped, or gone already: it is not waited for without end."""
    if not Path(f"/proc/{pid}").exists():
        return True
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


async def test_a_reload_asked_for_while_it_starts_comes_after(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        async with starting(tmp_path, config) as proxy:
            proxy.process.send_signal(signal.SIGHUP)
            os.kill(proxy.hsm_workers[0], signal.SIGCONT)
            await proxy.until(lambda: '"event": "reloaded"' in proxy.log, "a reload")
            assert await proxy.get() == (200, b"hello")
            assert await proxy.metric("tlsproxy_config_reloads_total", result="success") == 1
            assert await proxy.stop() == 0
        assert "Traceback" not in proxy.log


async def test_told_to_end_while_it_starts_it_ends_at_once(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with starting(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
        # A reload that has been asked for comes no more.
        proxy.process.send_signal(signal.SIGHUP)
        assert await told_to_end(proxy) == 0
        assert "told to end before it served" in proxy.log
        assert "Traceback" not in proxy.log
    assert not list((tmp_path / "run").rglob("*.sock"))


async def test_a_successor_that_is_told_to_end_while_it_starts_leaves_the_first_in_its_place(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        async with running_proxy(tmp_path, config) as proxy:
            async with starting(tmp_path, config, "--take-over") as successor:
                assert await told_to_end(successor) == 0
            assert await proxy.get() == (200, b"hello")
            assert "draining" not in proxy.log
            assert await proxy.stop() == 0
