"""`tlsproxy status`, as tables and as JSON, over a socket that only the proxy's own user can use."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from tests.proxy import free_port, make_site, run_to_end, running_proxy, site_config
from tlsproxy.serve.command_socket import command_line, key_file

KEYS = {"www": KeyType.ECDSA_P256}


async def test_the_status_tells_listeners_tokens_certificates_workers_and_handshakes(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")) as proxy:
        for _ in range(3):
            await proxy.handshake()
        code, stdout, stderr = await run_to_end("status", "--runtime-dir", str(tmp_path / "run"), "--json")
        assert (code, stderr) == (0, "")
        status = json.loads(stdout)
        assert status["ready"] is True
        (listener,) = status["listeners"]
        assert (listener["address"], listener["handshakes"]) == (f"127.0.0.1:{proxy.port}", 3)
        assert status["tokens"] == [{"name": "local", "up": True, "circuit": {"closed": 1}}]
        assert status["upstreams"] == [
            {"name": "app", "servers": [{"address": "127.0.0.1:9", "state": "up", "ejections": 0}]}
        ]
        (certificate,) = status["certificates"]
        assert (certificate["name"], certificate["key_type"]) == ("www", "ecdsa-p256")
        assert certificate["days_left"] > 0
        assert [worker["pid"] for worker in status["workers"]] == proxy.proxy_workers
        assert status["handshakes"]["per_s"] > 0
        assert status["handshakes"]["phases"]["sign"]["p99_s"] > 0

        code, stdout, stderr = await run_to_end("status", "--config", str(tmp_path / "proxy.yaml"))
        assert (code, stderr) == (0, "")
        rows = [line.split() for line in stdout.splitlines()]
        assert [f"127.0.0.1:{proxy.port}", "0", "3", "0"] in rows
        assert ["local", "up", "closed"] in rows
        assert ["app", "127.0.0.1:9", "up", "0"] in rows
        assert ["0", str(proxy.proxy_workers[0]), "ready"] in rows
        assert any(row[:1] == ["sign"] for row in rows)


async def test_a_server_that_does_not_answer_is_down(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    config = site_config(tmp_path, KEYS, f"127.0.0.1:{free_port()}")
    config["upstreams"][0]["ejection"] = {"failures": 1}
    async with running_proxy(tmp_path, config) as proxy:
        assert (await proxy.get())[0] == 502
        _, stdout, _ = await run_to_end("status", "--runtime-dir", str(tmp_path / "run"))
    server = config["upstreams"][0]["servers"][0]["address"]
    assert ["app", server, "DOWN", "1"] in [line.split() for line in stdout.splitlines()]


def wrong_key(command: str) -> bytes:
    return json.dumps({"command": command, "key": "\ud800" * 64}).encode() + b"\n"


async def errors_of(socket: Path, request: bytes) -> Any:
    reader, writer = await asyncio.open_unix_connection(str(socket))
    writer.write(request)
    answer = json.loads(await reader.readline())
    writer.close()
    return answer["errors"]


async def test_commands_that_make_no_sense_are_refused_and_cost_nothing(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9")):
        socket = tmp_path / "run" / "control.sock"
        assert os.stat(socket).st_mode & 0o777 == 0o600
        no_key = f"expected a command with the key in {key_file(socket)}"
        for request in (b"stop\n", b"[]\n", b"[" * 3000 + b"\n", b'{"command": "drain"}\n', wrong_key("drain")):
            assert await errors_of(socket, request) == [no_key]
        sing = command_line(socket, "sing")
        assert await errors_of(socket, sing) == ["expected one of the commands status, reload, drain"]
        reader, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(b" " * 100_000)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        assert (await run_to_end("status", "--runtime-dir", str(tmp_path / "run")))[0] == 0
