"""What `tlsproxy check` and a start say of a listener's CAs and CRLs: at their place in the configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsm.messages import KeyType
from tests.client_cas import HOUR, NOW, ClientCa
from tests.proxy import make_site, site_config
from tlsproxy.config import Config
from tlsproxy.config_yaml import parse_config
from tlsproxy.errors import ConfigError
from tlsproxy.serve import materials
from tlsproxy.serve.materials import check_materials, file_versions, load_materials

KEYS = {"www": KeyType.ECDSA_P256}
ROOT = ClientCa()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    make_site(tmp_path, KEYS)
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    (tmp_path / "crl.pem").write_bytes(ROOT.crl())
    return tmp_path


def config(directory: Path, **clients: Any) -> Config:
    settings = site_config(directory, KEYS, "127.0.0.1:1")
    settings["listeners"][0]["tls"] = {"client_certificates": {"ca_file": "clients.pem", **clients}}
    return parse_config(yaml.safe_dump(settings).encode(), "proxy.yaml", directory)


def problem(found: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        check_materials(found, load_materials(found))
    (only,) = caught.value.problems
    line, column = found.listeners[0].client_certificates.origin.keys[only.path.rpartition(".")[2]]  # type: ignore[union-attr]
    assert (only.line, only.column) == (line, column)
    return f"{only.path.removeprefix('listeners[0].tls.client_certificates.')}: {only.message}"


def test_sound_ones_are_read_and_sound_to_the_end(site: Path) -> None:
    found = config(site, crl_file="crl.pem")
    loaded = load_materials(found)
    check_materials(found, loaded)
    authorities = loaded.client_authorities[found.listeners[0].address]
    assert (len(authorities.certificates), len(authorities.crls)) == (1, 1)
    assert load_materials(config(site)).client_authorities.popitem()[1].crls == ()  # type: ignore[attr-defined]


def test_files_that_cannot_be_read_or_are_something_else(site: Path) -> None:
    assert problem(config(site, ca_file="gone.pem")) == (
        f"ca_file: {site}/gone.pem: expected a readable file; got No such file or directory"
    )
    assert problem(config(site, crl_file="gone.pem")) == (
        f"crl_file: {site}/gone.pem: expected a readable file; got No such file or directory"
    )
    assert problem(config(site, ca_file="www.pem")).startswith(
        f"ca_file: {site}/www.pem: CA certificates expected; got"
    )
    assert problem(config(site, crl_file="clients.pem")) == (
        f"crl_file: {site}/clients.pem: PEM certificate revocation lists expected; got none"
    )


def test_a_file_without_end(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(materials, "MAX_CRL_BYTES", 100)
    expected = f"crl_file: {site}/crl.pem: expected at most 100 bytes; got more"
    assert problem(config(site, crl_file="crl.pem")) == expected


def test_a_crl_that_has_expired_is_an_error_to_check_but_does_not_keep_the_proxy_from_its_start(site: Path) -> None:
    (site / "crl.pem").write_bytes(ROOT.crl(next_update=NOW - HOUR / 2))
    found = config(site, crl_file="crl.pem")
    load_materials(found)
    assert problem(found).startswith(
        f"crl_file: {site}/crl.pem: expected CRLs that are valid now, as clients are refused otherwise; got some from "
    )


def test_the_files_are_among_those_that_are_watched(site: Path) -> None:
    found = config(site, crl_file="crl.pem")
    without = dataclasses.replace(found, listeners=())
    before = file_versions(found)
    assert len(before) == len(file_versions(without)) + 2
    (site / "crl.pem").write_bytes(ROOT.crl(ROOT.issue()))
    assert file_versions(found) != before
    assert len(file_versions(config(site))) == len(before) - 1
