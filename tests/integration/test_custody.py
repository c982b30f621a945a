"""No private key, and no PIN, in any process but the HSM worker: the memory of all of them is searched."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.custody import private_key_patterns, scan_process
from tests.proxy import Proxy, make_site, running_proxy, site_config

KEYS = {"ecdsa": KeyType.ECDSA_P256, "rsa": KeyType.RSA_2048}
HANDSHAKES = 2000


async def shake_hands(proxy: Proxy, count: int) -> None:
    """Make handshakes, a few at a time, half with each key."""
    contexts = [proxy.client_context() for _ in range(2)]
    contexts[1].maximum_version = ssl.TLSVersion.TLSv1_2
    contexts[1].set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    slots = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        async with slots:
            await proxy.handshake(contexts[number % 2])

    await asyncio.gather(*map(one, range(count)))


async def test_no_proxy_or_supervisor_process_ever_holds_a_key(tmp_path: Path) -> None:
    token = make_site(tmp_path, KEYS)
    patterns = {
        f"{label}: {name}": pattern
        for label, key in token.private_keys.items()
        for name, pattern in private_key_patterns(key).items()
    }
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}", workers=2)
        async with running_proxy(tmp_path, config) as proxy:
            suspects = [proxy.process.pid, *proxy.proxy_workers]
            assert len(suspects) == 3

            async def hits() -> list[object]:
                return [hit for pid in suspects for hit in await asyncio.to_thread(scan_process, pid, patterns)]

            assert await hits() == []
            storm = asyncio.create_task(shake_hands(proxy, HANDSHAKES))
            assert await hits() == []
            await storm
            assert await hits() == []
            for key_type in ("ecdsa-p256", "rsa-2048"):
                done = await proxy.metric("tlsproxy_handshake_duration_seconds_count", key_type=key_type)
                assert done == HANDSHAKES / 2

            (hsm_worker,) = proxy.hsm_workers
            if os.geteuid() == 0:
                found = {hit.pattern.split(":")[0] for hit in scan_process(hsm_worker, patterns)}
                assert found == set(KEYS), "the search does not find what is there"
            else:
                with pytest.raises(PermissionError):
                    scan_process(hsm_worker, patterns)


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_a_pin_from_the_environment_reaches_no_proxy_worker(tmp_path: Path) -> None:
    token = make_site(tmp_path, {"www": KeyType.ECDSA_P256})
    pin = token.pin_file.read_text().strip()
    config = site_config(tmp_path, {"www": KeyType.ECDSA_P256}, "127.0.0.1:9")
    config["hsm"]["tokens"] = [
        {"name": "local", "kind": "soft", "path": "token", "pin_env": "TEST_TOKEN_PIN", "workers": 1}
    ]
    async with running_proxy(tmp_path, config, environment={"TEST_TOKEN_PIN": pin, "TEST_KEPT": "kept"}) as proxy:
        await proxy.handshake()
        (worker,) = proxy.proxy_workers
        environment = environment_of(worker)
        assert b"TEST_KEPT=kept" in environment
        assert b"TEST_TOKEN_PIN" not in environment
        assert scan_process(worker, {"PIN": pin.encode()}) == []
        assert pin not in proxy.log
