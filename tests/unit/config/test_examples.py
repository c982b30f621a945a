"""The example configurations are sound, and say the truth about defaults."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import defaultdict
from pathlib import Path

import pytest

from hsm.keys import public_key_der
from hsm.messages import KeyType
from hsm.pki import make_demo_ca
from tests.client_cas import ClientCa
from tests.tokens import make_soft_token
from tests.unit.config.test_config_yaml import MINIMAL, parse
from tlsproxy.cli import main
from tlsproxy.config_yaml import load_config
from tlsproxy.yaml_nodes import MappingReader

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The examples, with the files that the reference names."""
    for file in CONFIGS.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    token = make_soft_token(tmp_path, {"www-ecdsa": KeyType.ECDSA_P256})
    ca = make_demo_ca()
    (tmp_path / "ca.pem").write_bytes(ca.certificate_pem())
    clients = ClientCa()
    (tmp_path / "clients-ca.pem").write_bytes(clients.pem())
    (tmp_path / "clients.crl.pem").write_bytes(clients.crl())
    public_key = public_key_der(token.private_keys["www-ecdsa"].public_key())
    (tmp_path / "www.pem").write_bytes(ca.issue_leaf(public_key, ["www.example.com"], []))
    return tmp_path


@pytest.mark.parametrize("name", sorted(file.name for file in CONFIGS.glob("*.yaml")))
def test_an_example_is_sound(site: Path, name: str) -> None:
    assert load_config(str(site / name)).listeners


def test_the_reference_passes_every_check(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HSM_A_PIN", "0000")
    assert (main(["check", str(site / "reference.yaml")]), capsys.readouterr().err) == (0, "")


def test_the_reference_shows_every_key(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, set[str]] = defaultdict(set)
    shown: dict[str, set[str]] = defaultdict(set)
    finish = MappingReader.finish

    def note(reader: MappingReader) -> None:
        section = re.sub(r"\[\d+\]", "[]", reader.whole.path)
        known[section] |= set(reader._known)
        shown[section] |= reader._keys.keys()
        finish(reader)

    monkeypatch.setattr(MappingReader, "finish", note)
    load_config(str(site / "reference.yaml"))
    assert "listeners[].routes[].redirect" in known
    assert {section: keys - shown[section] for section, keys in known.items() if keys - shown[section]} == {}


@pytest.mark.parametrize("name", ["quickstart.yaml", "reference.yaml"])
def test_what_is_called_a_default_is_one(site: Path, name: str) -> None:
    shown = load_config(str(site / name))
    default = parse(MINIMAL)
    for key in ("workers", "drain_timeout_s", "hang_timeout_s", "log"):
        assert getattr(shown, key) == getattr(default, key)
    assert shown.runtime_dir.name == default.runtime_dir.name
    for key in ("sign_deadline_s", "max_pending"):
        assert getattr(shown.hsm, key) == getattr(default.hsm, key)
    for a, b in (
        (shown.listeners[0], default.listeners[0]),
        (shown.listeners[0].routes[0], default.listeners[0].routes[0]),
        (shown.upstreams[0], default.upstreams[0]),
        (shown.upstreams[0].servers[0], default.upstreams[0].servers[0]),
    ):
        for field in dataclasses.fields(a):
            if field.name not in ("address", "routes", "origin"):
                assert getattr(a, field.name) == getattr(b, field.name), field.name
