"""A real Prometheus that scrapes a proxy under test, once a second, with the rules that are shipped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

from tests.proxy import free_port

RULES = Path(__file__).parents[1] / "configs" / "prometheus" / "alerts.yaml"


class Prometheus:
    """A running Prometheus."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query. Raises ValueError for one that Prometheus refuses."""
        return await asyncio.to_thread(self._get, "query", {"query": expression})

    async def series(self, metric: str) -> list[dict[str, Any]]:
        """Return the label sets of a metric."""
        return await asyncio.to_thread(self._get, "series", {"match[]": metric})

    def _get(self, what: str, parameters: dict[str, str]) -> list[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                data = json.load(response)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(json.load(error)["error"]) from None
        return list(data["result"] if isinstance(data, dict) else data)


@contextlib.asynccontextmanager
async def running_prometheus(directory: Path, target: str) -> AsyncIterator[Prometheus]:
    """Run it while the context lasts, scraping `target` (host:port) as job tlsproxy."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "tlsproxy", "static_configs": [{"targets": [target]}]}],
    }
    (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (directory / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={directory / 'prometheus.yaml'}",
            f"--storage.tsdb.path={directory / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
            stderr=log,
        )
    try:
        running = Prometheus(port)
        for _ in range(600):
            assert process.returncode is None, (directory / "prometheus.log").read_text()
            with contextlib.suppress(OSError, ValueError):
                if await running.query("up == 1"):
                    break
            await asyncio.sleep(0.05)
        yield running
    finally:
        process.terminate()
        await process.wait()
