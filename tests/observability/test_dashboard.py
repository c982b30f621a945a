"""Every query of the Grafana dashboard, asked of a real Prometheus that scrapes a proxy under load."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import ssl
from pathlib import Path
from typing import Any

from hsm.messages import KeyType
from tests.backends import backend
from tests.prometheus import running_prometheus
from tests.proxy import Proxy, make_site, running_proxy, site_config

DASHBOARD = json.loads((Path(__file__).parents[2] / "configs" / "grafana" / "tlsproxy.json").read_text())
KEYS = {"www": KeyType.ECDSA_P256}
WINDOW = "10s"
VARIABLES = re.compile(r"\$(job|instance|listener|token)\b")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[tuple[str, str, str]]:
    """Return (panel, expression, legend) with the variables as Grafana has them when all is chosen."""
    return [
        (
            panel["title"],
            VARIABLES.sub(".*", target["expr"].replace("$__rate_interval", WINDOW)),
            target["legendFormat"],
        )
        for panel in panels()
        for target in panel["targets"]
    ]


def is_nameless(legend: str, labels: dict[str, str]) -> bool:
    """Tell whether a series would stand in its panel's legend without a name. One without a legend needs none."""
    return bool(legend) and not re.sub(r"\{\{(\w+)\}\}", lambda label: labels.get(label[1], ""), legend).strip()


async def load(proxy: Proxy) -> None:
    """Handshakes of both TLS versions and requests, until cancelled."""
    tls12 = proxy.client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
    while True:
        await proxy.get()
        await proxy.handshake(tls12)
        await asyncio.sleep(0.02)


async def test_under_load_no_panel_is_empty_or_in_error_and_every_series_has_a_name(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as app, running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")) as proxy:
        loading = asyncio.create_task(load(proxy))
        async with running_prometheus(tmp_path, f"127.0.0.1:{proxy.admin_port}") as prometheus:

            async def all_answered() -> bool:
                answers = [(panel, await prometheus.query(query), legend) for panel, query, legend in queries()]
                empty = {panel for panel, samples, _ in answers if not samples}
                undefined = {p for p, samples, _ in answers for s in samples if s["value"][1] in ("NaN", "+Inf")}
                missing.clear()
                missing.update(empty | undefined)
                nameless.update(
                    p for p, samples, legend in answers for s in samples if is_nameless(legend, s["metric"])
                )
                return not missing

            missing: set[str] = set()
            nameless: set[str] = set()
            for _ in range(30):
                if await all_answered():
                    break
                await asyncio.sleep(1)
            assert missing == set()
            assert nameless == set()
            for variable in DASHBOARD["templating"]["list"][1:]:
                metric, label = re.fullmatch(r"label_values\((\w+).*, (\w+)\)", variable["query"]["query"]).groups()
                assert all(label in labels for labels in await prometheus.series(metric))
                assert variable["name"] == label
        loading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loading


def test_panels_have_names_of_their_own_and_do_not_overlap() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for one, other in itertools.combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)
