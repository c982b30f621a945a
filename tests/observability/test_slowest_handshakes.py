from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}


async def test_the_slowest_handshakes_of_all_workers_are_listed_with_their_phases(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as app:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}", workers=2)
        async with running_proxy(tmp_path, config) as proxy:
            for _ in range(40):
                await proxy.handshake()

            async def listed() -> list[dict[str, Any]]:
                handshakes: list[dict[str, Any]] = json.loads((await proxy.admin("/handshakes/slowest"))[1])
                return handshakes

            async def all_listed() -> bool:
                return len(await listed()) == 40

            await proxy.until(all_listed, "all handshakes reported")
            handshakes = await listed()
            counted = await proxy.metric("tlsproxy_handshake_duration_seconds_sum", resumed="false")
    durations = [handshake["duration_s"] for handshake in handshakes]
    assert durations == sorted(durations, reverse=True)
    assert abs(sum(durations) - counted) < 1e-6
    for handshake in handshakes:
        assert abs(sum(handshake["phases"].values()) - handshake["duration_s"]) < 1e-5
        assert (handshake["token"], handshake["scheme"]) == ("local", "ecdsa_secp256r1_sha256")
        assert handshake["listener"] == config["listeners"][0]["address"]
