"""What the operators' documents say exists: commands and their options, metrics, files and headings."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import hsm.cli
import tlsproxy.cli
from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.pki import make_demo_ca
from tests.packaging.conftest import ROOT
from tlsproxy.config_yaml import load_config, parse_config
from tlsproxy.metrics import FAMILIES as PROXY_FAMILIES

DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
EVERY_DOCUMENT = [*DOCUMENTS, *sorted(ROOT.glob("*.md")), ROOT / "perf/README.md"]
TEXTS = {document.name: document.read_text() for document in DOCUMENTS}
_FAMILIES = {**PROXY_FAMILIES, **HSM_FAMILIES}
_NOT_METRICS = {"hsm_unavailable", "hsm_user"}
"""A value of the label `result`, and a key of the configuration."""
_NOT_KEYS = {"tls.cipher", "hsm.pin"}
"""Named as sections and keys are: a span's attribute, a file."""
_MAIN = {"tlsproxy": tlsproxy.cli.main, "hsm": hsm.cli.main}


def _anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def _commands() -> list[str]:
    """Return every line of a shell block that runs one of our commands."""
    texts = [document.read_text() for document in EVERY_DOCUMENT]
    blocks = [block for text in texts for block in re.findall(r"^ *```sh\n(.*?)```", text, re.MULTILINE | re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = sorted({line for line in lines if line.startswith(("tlsproxy ", "hsm "))})
    assert len(commands) > 5
    return commands


@pytest.mark.parametrize("command", _commands())
def test_a_command_shown_is_one_there_is(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its help names each option shown."""
    name, *arguments = shlex.split(command, comments=True)
    subcommand, *options = arguments
    with pytest.raises(SystemExit) as ended:
        _MAIN[name]([subcommand, "--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    for option in options:
        assert not option.startswith("--") or re.search(rf"{option}\b", help_text), f"{option} of {command}"


def _shell(script: str, directory: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", script], cwd=directory, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_leads_to_a_configuration_that_is_sound(tmp_path: Path) -> None:
    """Word for word, with a demo CA in the place of "your CA"."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = re.findall(r"^```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    before, ca, after = block.partition("# have your CA")
    assert ca
    _shell(before, tmp_path)
    request = x509.load_pem_x509_csr((tmp_path / "www.csr").read_bytes())
    public_key = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "www.pem").write_bytes(make_demo_ca().issue_leaf(public_key, ["www.example.com"], []))
    check, run = after.splitlines()[1:]
    _shell(check, tmp_path)
    assert run.startswith("tlsproxy run --config config.yaml ")


def test_every_metric_named_exists() -> None:
    for name, text in TEXTS.items():
        for metric in re.findall(r"\b(?:tlsproxy|hsm)_\w+", text):
            base = re.sub(r"_(bucket|count|sum)$", "", metric)
            known = metric in _FAMILIES or base in _FAMILIES or metric in _NOT_METRICS
            assert known, f"{name}: {metric}"


def test_links_lead_somewhere() -> None:
    for document in EVERY_DOCUMENT:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
            path, _, anchor = target.partition("#")
            found = document if not path else (document.parent / path).resolve()
            assert found.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in _anchors(found.read_text()), f"{document.name}: {target}"


def test_every_document_is_in_the_table_of_contents() -> None:
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", TEXTS["README.md"]))
    assert listed == set(TEXTS) - {"README.md"}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_configurations_shown_are_sound(name: str, tmp_path: Path) -> None:
    for block in re.findall(r"^```yaml\n(.*?)```", TEXTS[name], re.MULTILINE | re.DOTALL):
        parse_config(block.encode(), name, tmp_path)


def test_the_cloudhsm_document_and_its_configuration_name_the_same_things() -> None:
    (token,) = load_config(str(ROOT / "configs/cloudhsm.yaml")).hsm.tokens
    for thing in (token.module, token.token_label, token.pin_file):
        assert str(thing) in TEXTS["cloudhsm.md"]


_MEASURED = {
    r"full handshake, .*: ([0-9.]+) ms": ("HSM latency", "handshakes", "tlsproxy-pkcs11 at 20 ms", 1e3),
    r"resumed handshake: ([0-9.]+) ms": ("resumed", "handshakes", "tlsproxy", 1e3),
    r"small request .*?: ([0-9.]+) ms": ("requests", "requests", "tlsproxy", 1e3),
    r"`mode: tcp` ([0-9.]+) ms": ("requests", "requests", "tlsproxy-tcp", 1e3),
    r"response bodies: ([0-9.]+) s": ("bulk", "bulk", "tlsproxy", 1),
}
"""What sizing.md says of a proxy worker's CPU: the run, its turns, the case, and units a second."""


@pytest.mark.parametrize("words", list(_MEASURED))
def test_sizing_is_by_figures_that_were_measured(words: str) -> None:
    """To a third: more is a change that the document has to tell of."""
    run, what, case, scale = _MEASURED[words]
    (stated,) = re.findall(words, TEXTS["sizing.md"])
    report = json.loads((ROOT / "perf/results/data.json").read_text())
    turns = report["runs"][run]["parts"][0]["turns"][what][case]
    measured = statistics.median(turn["cpu_s"]["proxy"] / turn["operations"] for turn in turns)
    assert float(stated) == pytest.approx(measured * scale, rel=1 / 3)


def _keys_by_section() -> dict[str, set[str]]:
    """Return the keys of each section of the reference, which has every key there is (tests/unit/config)."""
    sections: dict[str, set[str]] = defaultdict(set)

    def walk(name: str, node: object) -> None:
        if isinstance(node, dict):
            sections[name] |= node.keys()
            for key, value in node.items():
                walk(key, value)
        elif isinstance(node, list):
            for item in node:
                walk(name, item)

    walk("", yaml.safe_load((ROOT / "configs/reference.yaml").read_text()))
    return sections


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_every_configuration_key_named_exists(name: str) -> None:
    """What is shown as `section.key` or as `key: value`."""
    sections = _keys_by_section()
    keys = set().union(*sections.values())
    shown = set(re.findall(r"`([^`\n]+)`", TEXTS[name])) - _NOT_KEYS
    dotted = {tuple(text.split(".")) for text in shown if re.fullmatch(r"[a-z_]+\.[a-z_]+", text)}
    assert {(section, key) for section, key in dotted if section in sections and key not in sections[section]} == set()
    assert {match[1] for text in shown if (match := re.match(r"([a-z_]+): ", text))} <= keys


def test_configuration_keys_named_in_the_migration_table_are_read() -> None:
    """Every `key:` and `limits: ...` that the table offers for an nginx directive is one the reader knows."""
    readers = "".join(path.read_text() for path in Path(ROOT, "tlsproxy").glob("*yaml*.py"))
    table = [line for line in TEXTS["migrating-from-nginx.md"].splitlines() if line.startswith("| `")]
    offered = {key for line in table for key in re.findall(r"`(?:[a-z]+\.)?([a-z_]+)(?::[^`]*)?`", line.split("|")[2])}
    keys = offered - {"auto"}
    assert len(keys) > 15
    assert not [key for key in keys if f'"{key}"' not in readers]
