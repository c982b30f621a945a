"""`/metrics` is what docs/metrics.md says, and what Prometheus' own linter accepts."""

from __future__ import annotations

import asyncio
import itertools
import re
from pathlib import Path

import pytest

from hsm.messages import KeyType
from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metricstore import Family
from tests.backends import backend
from tests.proxy import free_port, make_site, running_proxy, site_config
from tlsproxy.metrics import FAMILIES, HANDSHAKE_FAILURES

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
UNITS = {"_timestamp_seconds": "seconds since the epoch", "_seconds": "seconds", "_bytes_total": "bytes"}
KEYS = {"www": KeyType.ECDSA_P256}


def documented() -> dict[str, list[str]]:
    """Return the tables' rows by metric: type, unit, labels, help."""
    rows = re.findall(r"^\| `((?:tlsproxy|hsm)_\w+)` \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}


def row_of(family: Family) -> list[str]:
    unit = next((unit for suffix, unit in UNITS.items() if family.name.endswith(suffix)), "")
    return [family.kind.value, unit, ", ".join(f"`{label}`" for label in family.label_names), family.help]


def test_the_document_lists_every_family_as_the_code_declares_it() -> None:
    assert documented() == {name: row_of(family) for name, family in {**FAMILIES, **HSM_FAMILIES}.items()}


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
async def test_a_running_proxys_page_is_the_documented_one_and_passes_promtool(tmp_path: Path, accept: str) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as app, running_proxy(tmp_path, site_config(tmp_path, KEYS, f"127.0.0.1:{app.port}")) as proxy:
        assert (await proxy.get())[0] == 200
        _, page = await proxy.admin("/metrics", accept=accept)
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", page.decode(), re.MULTILINE))
    if accept != "text/plain":  # OpenMetrics names a counter's family without the suffix of its sample
        types = {name + "_total" * (kind == "counter"): kind for name, kind in types.items()}
    assert types == {name: row[0] for name, row in documented().items()}
    helps = re.findall(r"^# HELP (\w+) (.*)$", page.decode(), re.MULTILINE)
    assert {text for _, text in helps} == {row[3] for row in documented().values()}
    if accept == "text/plain":
        assert await promtool("check", "metrics", stdin=page) == (0, "")


async def test_what_has_not_happened_yet_is_counted_from_zero(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    upstream = f"127.0.0.1:{free_port()}"
    async with running_proxy(tmp_path, site_config(tmp_path, KEYS, upstream)) as proxy:
        _, page = await proxy.admin("/metrics")
    listener = f'listener="127.0.0.1:{proxy.port}"'
    zeros = {line.removesuffix(" 0.0") for line in page.decode().splitlines() if line.endswith(" 0.0")}
    assert zeros >= {
        *(
            f'tlsproxy_handshakes_total{{{listener},result="{result}",resumed="false",tls_version=""}}'
            for result in HANDSHAKE_FAILURES
        ),
        *(
            f'tlsproxy_handshakes_total{{{listener},result="ok",resumed="{resumed}",tls_version="{version}"}}'
            for resumed, version in itertools.product(("false", "true"), ("TLSv1.2", "TLSv1.3"))
        ),
        *(
            f'tlsproxy_connections_refused_total{{limit="{limit}",{listener}}}'
            for limit in ("connections", "connections_per_client", "descriptors", "handshakes", "proxy_protocol")
        ),
        *(
            f'tlsproxy_upstream_errors_total{{reason="{reason}",upstream="app"}}'
            for reason in ("connect_failed", "connect_timeout", "response_timeout", "connection_lost", "no_server")
        ),
        f'tlsproxy_upstream_ejections_total{{server="{upstream}",upstream="app"}}',
        'hsm_key_mismatches_total{token="local"}',
        *(f'hsm_shed_total{{reason="{reason}"}}' for reason in ("queue_full", "overloaded", "no_key", "unavailable")),
        *(f'hsm_hedges_total{{outcome="{outcome}"}}' for outcome in ("won", "lost", "no_budget")),
        *(f'hsm_policy_rejected_total{{rule="{rule}"}}' for rule in ("key-scheme", "tls12-point", "tls13-length")),
    }


async def promtool(*arguments: str, stdin: bytes = b"") -> tuple[int, str]:
    """Run promtool; return its exit code and what it found."""
    process = await asyncio.create_subprocess_exec(
        "promtool",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_promtool_does_find_fault() -> None:
    code, output = await promtool("check", "metrics", stdin=b"# TYPE x_total gauge\nx_total 1\n")
    assert code == 3
    assert "x_total" in output
