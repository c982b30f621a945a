"""The whole product as processes, for scenario tests: files, configuration, `tlsproxy run`, its ports, its end."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hsm.keys import public_key_der
from hsm.messages import KeyType
from hsm.pki import make_demo_ca
from tests.tokens import SoftTokenFiles, make_soft_token

TLSPROXY = (sys.executable, "-m", "tlsproxy")
READY_TIMEOUT_S = 60
_SAMPLE = re.compile(r"([a-z_:0-9]+)(?:\{(.*)\})? ([^ ]+)")
_LABEL = re.compile(r'([a-z_0-9]+)="([^"]*)"')


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing uses, and that no outgoing connection will be given meanwhile."""
    while True:
        port = random.randrange(12_000, 32_000)  # below Linux's range of ephemeral ports
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def passable_directory() -> Iterator[Path]:
    """Make a directory that other users may pass through, as pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="tlsproxy-test-") as name:
        os.chmod(name, 0o711)
        yield Path(name)


def make_site(directory: Path, keys: Mapping[str, KeyType], name: str = "token") -> SoftTokenFiles:
    """Make a soft token with `keys`, `ca.pem`, and for each key a chain `LABEL.pem` for localhost and 127.0.0.1."""
    token = make_soft_token(directory, keys, name)
    ca = make_demo_ca()
    (directory / "ca.pem").write_bytes(ca.certificate_pem())
    for label, key in token.private_keys.items():
        chain = ca.issue_leaf(public_key_der(key.public_key()), ["localhost"], ["127.0.0.1"])
        (directory / f"{label}.pem").write_bytes(chain)
    return token


def site_config(directory: Path, keys: Mapping[str, KeyType], upstream: str, **changes: Any) -> dict[str, Any]:
    """Return a configuration for what `make_site` made: one listener with all keys, one upstream, an admin port."""
    config: dict[str, Any] = {
        "workers": 1,
        "runtime_dir": str(directory / "run"),
        "drain_timeout": "5s",
        "log": {"level": "info", "format": "json"},
        "hsm": {"tokens": [{"name": "local", "kind": "soft", "path": "token", "pin_file": "token.pin", "workers": 1}]},
        "certificates": [{"name": label, "chain_file": f"{label}.pem", "key": label} for label in keys],
        "listeners": [
            {
                "address": f"127.0.0.1:{free_port()}",
                "certificates": list(keys),
                "routes": [{"upstream": "app"}],
            }
        ],
        "upstreams": [{"name": "app", "servers": [{"address": upstream}]}],
        "admin": {"address": f"127.0.0.1:{free_port()}"},
    }
    return config | changes


class Proxy:
    """A running `tlsproxy run`."""

    def __init__(self, directory: Path, config: Mapping[str, Any], process: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.config = config
        self.process = process
        self.port = int(config["listeners"][0]["address"].rpartition(":")[2])
        self.admin_port = int(config["admin"]["address"].rpartition(":")[2])

    @property
    def log(self) -> str:
        """What it and its children have written to stderr so far."""
        return (self.directory / "stderr").read_text()

    def client_context(self, **settings: Any) -> ssl.SSLContext:
        """Return a context of a client that trusts the site's CA."""
        context = ssl.create_default_context(cafile=self.directory / "ca.pem")
        for name, value in settings.items():
            setattr(context, name, value)
        return context

    async def handshake(self, context: ssl.SSLContext | None = None) -> str:
        """Make one TLS connection and close it; return the TLS version."""
        _, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=context or self.client_context(), server_hostname="localhost"
        )
        version: str = writer.get_extra_info("ssl_object").version()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return version

    async def get(self, path: str = "/") -> tuple[int, bytes]:
        """GET over a new TLS connection; return status and body."""
        return await asyncio.to_thread(self._get, path)

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPSConnection("localhost", self.port, timeout=30, context=self.client_context())
        connection.sock = connection._context.wrap_socket(  # type: ignore[attr-defined]
            socket.create_connection(("127.0.0.1", self.port), timeout=30), server_hostname="localhost"
        )
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    async def admin(self, path: str, accept: str = "*/*") -> tuple[int, bytes]:
        """GET on the admin port; return status and body."""
        return await asyncio.to_thread(self._admin, path, accept)

    def _admin(self, path: str, accept: str) -> tuple[int, bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=30)) as connection:
            connection.request("GET", path, headers={"Accept": accept})
            response = connection.getresponse()
            return response.status, response.read()

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples `name` that have these labels."""
        total = 0.0
        for line in (await self.admin("/metrics"))[1].decode().splitlines():
            match = _SAMPLE.fullmatch(line)
            if match and match[1] == name and labels.items() <= dict(_LABEL.findall(match[2] or "")).items():
                total += float(match[3])
        return total

    def children(self, module: str) -> list[int]:
        """Return the process ids of the children that run `python -m MODULE`."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, IndexError, ValueError):
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and module.encode() in arguments:
                    found.append(int(entry.name))
        return sorted(found)

    @property
    def proxy_workers(self) -> list[int]:
        """Process ids."""
        return self.children("tlsproxy.serve.worker")

    @property
    def hsm_workers(self) -> list[int]:
        """Process ids."""
        return self.children("hsm.worker")

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until an (async) condition holds; a scenario that never gets there fails with `what`."""
        for _ in range(600):
            result = condition()
            if await result if asyncio.iscoroutine(result) else result:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never: {what}\n{self.log}")

    async def stop(self) -> int:
        """End it with SIGTERM; return its exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 60)


def write_config(directory: Path, config: Mapping[str, Any]) -> Path:
    """Write `proxy.yaml`."""
    path = directory / "proxy.yaml"
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


@contextlib.asynccontextmanager
async def running_proxy(
    directory: Path,
    config: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (),
) -> AsyncIterator[Proxy]:
    """Run the product with `config` while the context lasts; ready when it begins. `launcher` is to execute it."""
    with (directory / "stderr").open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *launcher,
            *TLSPROXY,
            "run",
            "--config",
            str(write_config(directory, config)),
            stderr=stderr,
            env={**os.environ, **(environment or {})},
        )
    proxy = Proxy(directory, config, process)
    try:
        await _wait_ready(proxy)
        yield proxy
    except BaseException:
        sys.stderr.write(proxy.log)  # pytest shows it with the failure
        raise
    finally:
        if process.returncode is None:
            await proxy.stop()


async def _wait_ready(proxy: Proxy) -> None:
    async def ready() -> bool:
        if proxy.process.returncode is not None:
            raise AssertionError(f"tlsproxy ended with {proxy.process.returncode}\n{proxy.log}")
        with contextlib.suppress(OSError):
            return (await proxy.admin("/readyz"))[0] == 200
        return False

    await proxy.until(ready, "ready")


async def run_to_end(*arguments: str, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run `tlsproxy ARGUMENTS` until it ends; return exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        *TLSPROXY,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, stdout.decode(), stderr.decode()


def log_events(log: str) -> list[dict[str, Any]]:
    """Return the JSON lines of a log."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]
