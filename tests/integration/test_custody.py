"""No private key, and no PIN, in any process but the HSM worker: the memory of all of them is searched."""

from __future__ import annotations

import asyncio
import os
import re
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


async def test_a_pin_from_the_environment_reaches_no_other_tokens_worker(tmp_path: Path) -> None:
    tokens = {name: make_site(tmp_path, {"www": KeyType.ECDSA_P256}, name) for name in ("a", "b")}
    environment = {f"PIN_{name}": token.pin_file.read_text().strip() for name, token in tokens.items()}
    config = site_config(tmp_path, {"www": KeyType.ECDSA_P256}, "127.0.0.1:9")
    config["hsm"]["tokens"] = [
        {"name": name, "kind": "soft", "path": name, "pin_env": f"PIN_{name}", "workers": 1} for name in tokens
    ]
    config["certificates"][0]["tokens"] = ["b"]
    async with running_proxy(tmp_path, config, environment) as proxy:
        await proxy.handshake()
        # Only root can read the environment of a process that is sealed.
        if os.geteuid() == 0:
            found = [re.findall(rb"PIN_(.)=", environment_of(pid)) for pid in proxy.hsm_workers]
            assert sorted(found) == [[b"a"], [b"b"]]


async def test_a_pin_from_the_environment_reaches_no_proxy_worker(tmp_path: Path) -> None:
    token = make_site(tmp_path, {"www": KeyType.ECDSA_P256})
    pin = token.pin_file.read_text().strip()
    config = site_config(tmp_path, {"www": KeyType.ECDSA_P256}, "127.0.0.1:9")
    config["hsm"]["tokens"] = [
        {"name": "local", "kind": "soft", "path": "token", "pin_env": "TEST_TOKEN_PIN", "workers": 1}
    ]
    environment = {"TEST_TOKEN_PIN": pin, "AWS_SECRET_ACCESS_KEY": "secret", "OTEL_SERVICE_NAME": "kept"}
    async with running_proxy(tmp_path, config, environment) as proxy:
        await proxy.handshake()
        (worker,) = proxy.proxy_workers
        inherited = environment_of(worker)
        assert b"OTEL_SERVICE_NAME=kept" in inherited
        assert b"AWS_SECRET_ACCESS_KEY" not in inherited
        assert b"TEST_TOKEN_PIN" not in inherited
        assert scan_process(worker, {"PIN": pin.encode()}) == []
        assert pin not in proxy.log
