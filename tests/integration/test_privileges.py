"""Started by root, workers run as other users; nobody of these users can look into an HSM worker."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.implant import SPY
from tests.proxy import Proxy, make_site, passable_directory, run_to_end, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}
PROXY_UID, HSM_UID = 61_001, 61_002


@pytest.fixture
def directory() -> Iterator[Path]:
    with passable_directory() as path:
        yield path


@contextlib.asynccontextmanager
async def site(directory: Path, proxy_uid: int, hsm_uid: int) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    for secret in ("token", "token.pin"):
        os.chown(directory / secret, hsm_uid, hsm_uid)
    async with backend() as upstream:
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", user=str(proxy_uid), hsm_user=str(hsm_uid))
        async with running_proxy(directory, config) as proxy:
            yield proxy


def status(pid: int, key: str) -> list[str]:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.split()[1:]
    raise AssertionError(key)


async def test_workers_run_as_users_of_their_own_without_any_privilege(directory: Path) -> None:
    if os.geteuid() != 0:
        await expect_refusal(directory)
        return
    async with site(directory, PROXY_UID, HSM_UID) as proxy:
        assert await proxy.get() == (200, b"hello")
        for pids, uid in ((proxy.proxy_workers, PROXY_UID), (proxy.hsm_workers, HSM_UID)):
            for pid in pids:
                assert status(pid, "Uid") == [str(uid)] * 4
                assert status(pid, "Gid") == [str(uid)] * 4
                assert status(pid, "Groups") == []
                assert status(pid, "CapEff") == status(pid, "CapPrm") == ["0" * 16]
                assert status(pid, "NoNewPrivs") == ["1"]
        run = directory / "run"
        (sockets,) = run.glob("hsm-*")
        commands = run / "control.sock", run / "control.key"
        found = {path: path.stat() for path in (run, sockets, sockets / "local-0.sock", *commands)}
        assert [oct(item.st_mode & 0o777) for item in found.values()] == ["0o710", "0o710", "0o660", "0o600", "0o600"]
        assert {item.st_uid for item in found.values()} == {0}
        assert [item.st_gid for item in found.values()][:3] == [PROXY_UID] * 3


async def expect_refusal(directory: Path) -> None:
    make_site(directory, KEYS)
    config = site_config(directory, KEYS, "127.0.0.1:9", user=str(PROXY_UID))
    code, _, stderr = await run_to_end("run", "--config", str(write_config(directory, config)))
    assert (code, stderr) == (1, f"tlsproxy: user: only root can start workers as another user; got '{PROXY_UID}'\n")


async def test_the_user_of_a_proxy_worker_cannot_look_into_an_hsm_worker_of_the_same_user(directory: Path) -> None:
    if os.geteuid() != 0:
        await expect_refusal(directory)
        return
    async with site(directory, PROXY_UID, PROXY_UID) as proxy:
        assert await proxy.get() == (200, b"hello")
        (worker,) = proxy.hsm_workers
        assert set(spied(worker).values()) <= {errno.EPERM, errno.EACCES}
        with unsealed_process() as pid:
            assert "done" in spied(pid).values()


@contextlib.contextmanager
def unsealed_process() -> Iterator[int]:
    """Run a process of that user that can be looked into, so that the test can fail."""
    with subprocess.Popen(["/bin/sleep", "60"], user=PROXY_UID, group=PROXY_UID, extra_groups=[]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def spied(pid: int) -> dict[str, int | str]:
    """Try everything as the proxy workers' user."""
    become = f"from hsm.seal import become\nbecome(({PROXY_UID}, {PROXY_UID}))"
    spy = f"{SPY}\n{become}\nprint(json.dumps(spy({pid})))"
    output = subprocess.run([sys.executable, "-c", spy], capture_output=True, text=True, check=True).stdout
    results: dict[str, int | str] = json.loads(output)
    return results


async def test_a_user_that_does_not_exist_is_one_clear_line(directory: Path) -> None:
    make_site(directory, KEYS)
    config = site_config(directory, KEYS, "127.0.0.1:9", hsm_user="no-such-user")
    code, _, stderr = await run_to_end("run", "--config", str(write_config(directory, config)))
    assert code == 1
    assert "tlsproxy: hsm_user: expected a user of this machine; got 'no-such-user'\n" in stderr
