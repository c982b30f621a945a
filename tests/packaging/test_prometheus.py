"""The alerts fire when they should, ask for metrics there are, and lead to a page of the runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metricstore import Family, Kind
from tests.packaging.conftest import ROOT
from tlsproxy.metrics import FAMILIES as PROXY_FAMILIES

DIRECTORY = ROOT / "configs/prometheus"
RULES = [rule for group in yaml.safe_load((DIRECTORY / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
# Labels that Prometheus itself adds, or that a histogram's buckets have.
_GIVEN_LABELS = {"job", "instance", "le"}


def _family(name: str) -> Family:
    families = {**PROXY_FAMILIES, **HSM_FAMILIES}
    family = families.get(name) or families[name.removesuffix("_bucket")]
    assert (family.kind is Kind.HISTOGRAM) == name.endswith("_bucket")
    return family


def test_promtool_finds_nothing() -> None:
    for command in (
        ["check", "config", "prometheus.yaml"],
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts_test.yaml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=DIRECTORY, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_queries_that_documents_show_are_sound(tmp_path: Path) -> None:
    text = "".join(document.read_text() for document in sorted((ROOT / "docs").glob("*.md")))
    blocks = re.findall(r"^ *```promql\n(.*?)\n *```", text, re.MULTILINE | re.DOTALL)
    queries = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(queries) > 3
    rules = [{"record": f"shown:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "shown", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", "rules.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_metric_and_label_asked_for_exists() -> None:
    for rule in RULES:
        expression = re.sub(r"tlsproxy:\w+:\w+|\"[^\"]*\"", "", rule["expr"])
        families = [_family(name) for name in re.findall(r"\b(?:tlsproxy|hsm)_\w+", expression)]
        known = _GIVEN_LABELS.union(*(family.label_names for family in families))
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        used = {label.strip() for group in grouped for label in group.split(",")}
        used |= set(re.findall(r"[{,](\w+)=", expression))
        used |= set(re.findall(r"\$labels\.(\w+)", str(rule.get("annotations"))))
        assert used <= known, rule


def test_every_result_named_is_one_the_proxy_counts() -> None:
    named = {
        name for rule in RULES for names in re.findall(r'result=~"([^"]*)"', rule["expr"]) for name in names.split("|")
    }
    known = re.findall(r"\w+", PROXY_FAMILIES["tlsproxy_handshakes_total"].help.partition("by result: ")[2])
    assert named <= set(known)


def test_every_alert_leads_to_a_page_of_the_runbook() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert {alert["annotations"]["runbook"] for alert in ALERTS} <= anchors
    assert {alert["labels"]["severity"] for alert in ALERTS} == {"page", "ticket"}


def test_every_alert_is_described_for_operators() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE))
    assert described == {alert["alert"] for alert in ALERTS}
