"""Reverse proxies written in Python, in a virtual environment of their own: mitmproxy, and hypercorn with httpx."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from perf.setups.base import Setup

_ENVIRONMENT = Path(__file__).parents[2] / "build" / "perf-peers"
_PACKAGES = ("mitmproxy", "hypercorn", "httpx")
_APPLICATION = '''\
"""A reverse proxy as an ASGI application: every request is streamed through one httpx client."""

import os

import httpx

NO_LIMITS = httpx.Limits(max_connections=None)
client = httpx.AsyncClient(base_url=os.environ["PERF_UPSTREAM"], limits=NO_LIMITS)


async def body(receive):
    more = True
    while more:
        message = await receive()
        more = message["more_body"]
        yield message["body"]


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    headers = [field for field in scope["headers"] if field[0] != b"connection"]
    content = None if scope["method"] == "GET" else body(receive)
    request = client.build_request(scope["method"], scope["path"], headers=headers, content=content)
    response = await client.send(request, stream=True)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.headers.raw})
    async for piece in response.aiter_raw():
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await response.aclose()
    await send({"type": "http.response.body"})
'''


def install_python_peers() -> None:
    """Make the virtual environment and install the peers, unless that is done. Raises RuntimeError."""
    done = _ENVIRONMENT / "installed"
    if done.exists():
        return
    pip = [str(_ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", str(_ENVIRONMENT)], [*pip, *_PACKAGES]):
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    done.touch()


class _PythonPeer(Setup):
    def _program(self, name: str) -> str:
        install_python_peers()
        return str(_ENVIRONMENT / "bin" / name)


class Mitmdump(_PythonPeer):
    """mitmproxy as a reverse proxy, without its web interface and console; large bodies are streamed, not collected."""

    name = "mitmdump"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """All on the command line."""
        site = self.site
        settings = [f"confdir={self.directory}", "connection_strategy=lazy", "http2=false", "flow_detail=0"]
        settings.append("stream_large_bodies=1m")
        command = [self._program("mitmdump"), "--quiet", "--listen-host", self.host, "--listen-port", str(self.port)]
        command += ["--mode", f"reverse:http://127.0.0.1:{site.backend_port}"]
        command += ["--certs", f"*={site.credential.combined_file}"]
        for setting in settings:
            command += ["--set", setting]
        return command, {}


class HypercornHttpx(_PythonPeer):
    """hypercorn with uvloop in front of an ASGI application that asks the upstream through httpx."""

    name = "hypercorn-httpx"

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write the application."""
        (self.directory / "perf_application.py").write_text(_APPLICATION)
        site = self.site
        command = [self._program("hypercorn"), "--bind", f"{self.host}:{self.port}", "--workers", str(site.workers)]
        command += ["--certfile", str(site.credential.chain_file), "--keyfile", str(site.credential.key_file)]
        command += ["--log-level", "error", "--keep-alive", "3600", "perf_application:application"]
        environment = {"PYTHONPATH": str(self.directory), "PERF_UPSTREAM": f"http://127.0.0.1:{site.backend_port}"}
        return command, environment | {"PATH": f"{_ENVIRONMENT / 'bin'}:{os.environ['PATH']}"}
