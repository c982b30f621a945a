"""What a proxy worker can still do once it is confined by Landlock, tried in a process that has done the same."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import log_events, make_site, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}
ATTEMPTS = """
import json, os, socket, sys
from hsm.seal import forbid_new_privileges
from tlsproxy.serve.sandbox import confine

def attempt(what):
    try:
        what()
        return "done"
    except OSError as error:
        return error.strerror

def bind():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

secret, resolves_names = sys.argv[1], sys.argv[2] == "names"
forbid_new_privileges()
abi = confine(resolves_names=resolves_names)
import sqlite3.dump  # modules can be imported as ever
results = {
    "read": attempt(lambda: open(secret).read()),
    "write": attempt(lambda: open(secret + ".new", "w")),
    "list": attempt(lambda: os.listdir(os.path.dirname(secret))),
    "unlink": attempt(lambda: os.unlink(secret)),
    "hosts": attempt(lambda: open("/etc/hosts").read()),
    "library": attempt(lambda: open("/usr/lib/os-release").read()),
    "bind": attempt(bind),
    "signal": attempt(lambda: os.kill(os.getppid(), 0)),
}
print(json.dumps({"abi": abi, **results}))
"""


@pytest.mark.parametrize("names", ["names", "addresses"])
async def test_a_confined_process_reads_its_program_and_no_more(tmp_path: Path, names: str) -> None:
    secret = tmp_path / "token.pin"
    secret.write_text("1234")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ATTEMPTS, str(secret), names, stdout=subprocess.PIPE, env={**os.environ}
    )
    output, _ = await process.communicate()
    results = json.loads(output)
    abi = results.pop("abi")
    refused = "Permission denied"
    expected = dict.fromkeys(results, "done")
    if abi >= 1:
        expected |= dict.fromkeys(("read", "write", "list", "unlink"), refused)
        expected["hosts"] = "done" if names == "names" else refused
    if abi >= 4:
        expected["bind"] = refused
    if abi >= 6:
        expected["signal"] = "Operation not permitted"
    assert results == expected


async def test_proxy_workers_are_confined_and_serve(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"localhost:{upstream.port}")
        async with running_proxy(tmp_path, config) as proxy:
            assert await proxy.get() == (200, b"hello")
            (confined,) = [event for event in log_events(proxy.log) if "confined" in event["event"]]
            assert confined["process"] == "proxy-0"
            assert (confined["event"] == "confined") == (confined["landlock"] > 0)
