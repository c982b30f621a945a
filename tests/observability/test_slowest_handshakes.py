from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.dataplane import until
from tests.proxy import make_site, running_proxy, site_config
from tests.unit.serve.test_anatomy import HANDSHAKE
from tlsproxy.serve import processes
from tlsproxy.serve.anatomy import SLOWEST
from tlsproxy.serve.control import Drain, slow_handshake_line
from tlsproxy.serve.processes import ProxyWorker

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


async def test_a_worker_that_tells_of_too_many_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flood = tmp_path / "python"
    line = slow_handshake_line(HANDSHAKE)
    flood.write_text(
        f"#!{sys.executable}\n"
        "import socket, sys\n"
        "control = socket.socket(fileno=int(sys.argv[3]))\n"
        f"while True: control.sendall({line!r} * 50)\n"
    )
    flood.chmod(0o700)
    monkeypatch.setattr(processes.sys, "executable", str(flood))
    worker = ProxyWorker(0, [], lambda worker: Drain(1), os.environ, lambda: None, 10.0)  # type: ignore[arg-type]
    try:
        await until(lambda: "proxy worker broke the protocol" in caplog.text)
        assert len(list(worker.slowest)) == SLOWEST
    finally:
        await worker.close(lambda fd: None)
    errors = {getattr(record, "error", None) for record in caplog.records}
    assert "at most 5000 lines a second expected" in errors
