"""What the unit takes away from the service, the service does not need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.proxy
from hsm.messages import KeyType
from tests.backends import backend
from tests.packaging.test_systemd import SERVICE
from tests.proxy import make_site, passable_directory, run_to_end, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}
PROXY_UID, HSM_UID = 61_003, 61_004


@pytest.fixture
def directory() -> Iterator[Path]:
    with passable_directory() as path:
        yield path


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """As root: only the unit's capabilities, and workers with users of their own. Others have none anyway."""
    if os.geteuid() != 0:
        return {}
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in SERVICE["CapabilityBoundingSet"].split())
    setpriv = ("setpriv", f"--bounding-set=-all,{kept}", "--inh-caps=-all", "--no-new-privs")
    monkeypatch.setattr(tests.proxy, "TLSPROXY", (*setpriv, *tests.proxy.TLSPROXY))
    return {"user": str(PROXY_UID), "hsm_user": str(HSM_UID)}


async def test_the_capabilities_of_the_unit_are_enough(directory: Path, users: dict[str, str]) -> None:
    make_site(directory, KEYS)
    if users:
        os.chown(directory / "token.pin", HSM_UID, HSM_UID)
    (directory / "token").chmod(0o644)
    async with backend() as upstream:
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", **users)
        async with running_proxy(directory, config) as proxy:
            assert await proxy.get() == (200, b"hello")
            ended = proxy.proxy_workers + proxy.hsm_workers
            write_config(directory, {**config, "hsm": {**config["hsm"], "sign_deadline": "3s"}, "hang_timeout": "9s"})
            reloaded = await run_to_end("reload", "--config", str(directory / "proxy.yaml"))
            assert reloaded[0] == 0, reloaded
            assert await proxy.get() == (200, b"hello")
            await proxy.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ended), "old workers ended")
            assert await proxy.stop() == 0
