"""`tlsproxy run` with a cluster of PKCS#11 tokens behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hsm.keys import public_key_der
from hsm.messages import KeyType
from hsm.pki import make_demo_ca
from hsm.pool import SignerPool
from tests.backends import backend
from tests.fault_module import On
from tests.proxy import run_to_end, running_proxy, site_config, write_config
from tests.softhsm import FaultyToken
from tlsproxy.config_yaml import load_config
from tlsproxy.errors import StartupError
from tlsproxy.serve import tokens
from tlsproxy.serve.materials import load_materials
from tlsproxy.serve.tokens import TokenGroups

CKR_DEVICE_REMOVED = 0x32

KEYS = {"www": KeyType.ECDSA_P256, "rsa": KeyType.RSA_2048}


def cluster(directory: Path, upstream: str) -> tuple[dict[str, Any], dict[str, FaultyToken]]:
    """Make tokens `a` and `b` with the same keys, certificates for these, and a configuration that uses it all."""
    cluster_tokens = {name: FaultyToken(directory, KEYS, name) for name in ("a", "b")}
    ca = make_demo_ca()
    (directory / "ca.pem").write_bytes(ca.certificate_pem())
    for label, key in cluster_tokens["a"].private_keys.items():
        (directory / f"{label}.pem").write_bytes(ca.issue_leaf(public_key_der(key.public_key()), ["localhost"]))
    config = site_config(directory, KEYS, upstream)
    config["hsm"]["tokens"] = [
        {
            "name": name,
            "kind": "pkcs11",
            "module": str(token.faults.path),
            "token_label": name,
            "pin_file": str(token.pin_file),
            "sessions": 4,
        }
        for name, token in cluster_tokens.items()
    ]
    return config, cluster_tokens


async def test_a_cluster_of_pkcs11_tokens_serves(tmp_path: Path) -> None:
    async with backend() as upstream:
        config, _ = cluster(tmp_path, f"127.0.0.1:{upstream.port}")
        assert (await run_to_end("check", str(write_config(tmp_path, config))))[0] == 0
        async with running_proxy(tmp_path, config) as proxy:
            for _ in range(20):
                assert await proxy.get() == (200, b"hello")
            assert len(proxy.hsm_workers) == 2
            assert await proxy.metric("hsm_sign_requests_total", result="ok") == 20


async def test_a_missing_module_is_one_line_and_exit_2(tmp_path: Path) -> None:
    config, _ = cluster(tmp_path, "127.0.0.1:9")
    config["hsm"]["tokens"][1]["module"] = "/nowhere/module.so"
    file = write_config(tmp_path, config)
    for command in ("check", "run --config"):
        code, _, stderr = await run_to_end(*command.split(), str(file))
        (line,) = [line for line in stderr.splitlines() if line.startswith(f"{file}:")]
        assert code == 2
        assert ": hsm.tokens[1].module: " in line
        assert "/nowhere/module.so" in line


async def test_a_token_that_is_away_costs_a_warning_while_another_has_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raw, faulty = cluster(tmp_path, "127.0.0.1:9")
    faulty["b"].faults.fail(CKR_DEVICE_REMOVED, On.ALL)
    config = load_config(str(write_config(tmp_path, raw)))
    config.runtime_dir.mkdir(mode=0o700)
    monkeypatch.setattr(tokens, "READY_TIMEOUT_S", 2.0)
    async with TokenGroups(config) as groups:
        await groups.wait_ready(load_materials(config).certificates)
    (warning,) = [record for record in caplog.records if record.message == "starting without a token"]
    assert "token b" in vars(warning)["reason"]
    assert "CKR_DEVICE_REMOVED" in vars(warning)["reason"]


async def test_a_certificate_whose_tokens_are_all_away_keeps_it_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, faulty = cluster(tmp_path, "127.0.0.1:9")
    raw["certificates"][1]["tokens"] = ["b"]
    faulty["b"].faults.fail(CKR_DEVICE_REMOVED, On.ALL)
    config = load_config(str(write_config(tmp_path, raw)))
    config.runtime_dir.mkdir(mode=0o700)
    monkeypatch.setattr(tokens, "READY_TIMEOUT_S", 2.0)
    async with TokenGroups(config) as groups:
        with pytest.raises(StartupError, match=r"'rsa': none of its tokens is ready: .*CKR_DEVICE_REMOVED"):
            await groups.wait_ready(load_materials(config).certificates)


async def test_at_a_reload_every_new_token_must_open_and_the_others_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, faulty = cluster(tmp_path, "127.0.0.1:9")
    both = load_config(str(write_config(tmp_path, raw)))
    one = load_config(str(write_config(tmp_path, without_token_b(raw))))
    one.runtime_dir.mkdir(mode=0o700)
    monkeypatch.setattr(tokens, "READY_TIMEOUT_S", 2.0)
    async with TokenGroups(one) as present:
        await present.wait_ready(load_materials(one).certificates)
        faulty["b"].faults.fail(CKR_DEVICE_REMOVED, On.ALL)
        new = TokenGroups(both, present)
        new.start()
        with pytest.raises(StartupError, match=r"token b: .*CKR_DEVICE_REMOVED"):
            await new.wait_ready(load_materials(both).certificates, all_new=True)
        await new.stop(keep=[present])
        assert new.endpoints[0] == present.endpoints[0]
        async with SignerPool(present.endpoints) as pool:
            await pool.wait_ready(10)


def without_token_b(raw: dict[str, Any]) -> dict[str, Any]:
    (first, *_) = raw["hsm"]["tokens"]
    certificates = [{**certificate, "tokens": [first["name"]]} for certificate in raw["certificates"]]
    return raw | {"hsm": {**raw["hsm"], "tokens": [first]}, "certificates": certificates}
