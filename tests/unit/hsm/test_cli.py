from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from hsm import cli
from hsm.keys import PrivateKey, load_public_key
from hsm.messages import KeyType
from hsm.vault import Vault, read_public_keys
from tests.tokens import PIN, SoftTokenFiles, make_soft_token, private_key


@pytest.fixture(autouse=True)
def stay_dumpable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command closes its process to dumps, which cannot be asked of the process that runs all the tests."""
    monkeypatch.setattr(cli, "forbid_dumps", lambda: None)


@pytest.fixture
def files(tmp_path: Path) -> SoftTokenFiles:
    return make_soft_token(tmp_path)


def run(files: SoftTokenFiles, command: str, *arguments: str) -> int:
    return cli.main([command, "--token", str(files.path), "--pin-file", str(files.pin_file), *arguments])


def write_pem(path: Path, key: PrivateKey | ed25519.Ed25519PrivateKey, encryption: KeySerializationEncryption) -> str:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return str(path)


def test_a_token_from_nothing_to_a_certificate_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token, pin_file, out = (str(tmp_path / name) for name in ("token", "pin", "csr.pem"))
    common = ["--token", token, "--pin-file", pin_file]
    assert cli.main(["init", *common]) == 0
    assert stat.S_IMODE(os.stat(pin_file).st_mode) == 0o600
    assert cli.main(["keygen", *common, "--label", "www", "--type", "ecdsa-p256"]) == 0
    csr = ["csr", *common, "--label", "www", "--subject", "CN=a.example", "--dns", "a.example", "--dns", "b.example"]
    assert cli.main([*csr, "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(csr) == 0
    assert "BEGIN CERTIFICATE REQUEST" in capsys.readouterr().out
    assert cli.main(["list", "--token", token]) == 0
    (key,) = read_public_keys(token)
    assert capsys.readouterr().out.startswith(f"www\tecdsa-p256\t{key.id.hex()}\t")
    request = x509.load_pem_x509_csr(Path(out).read_bytes())
    assert request.is_signature_valid
    assert request.public_key() == load_public_key(key.public_key)
    assert Path(pin_file).read_text().strip() not in capsys.readouterr().out


def test_init_keeps_a_pin_file_that_is_there_and_leaves_none_behind(
    files: SoftTokenFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["init", "--token", str(tmp_path / "second"), "--pin-file", str(files.pin_file)]) == 0
    assert files.pin_file.read_text() == PIN + "\n"
    assert cli.main(["init", "--token", str(files.path), "--pin-file", str(tmp_path / "new.pin")]) == 2
    assert not (tmp_path / "new.pin").exists()
    assert "expected no such file; it exists" in capsys.readouterr().err


def test_import_stores_an_existing_key(files: SoftTokenFiles, tmp_path: Path) -> None:
    key = private_key(KeyType.RSA_2048, "imported")
    pem = write_pem(tmp_path / "key.pem", key, NoEncryption())
    assert run(files, "import", "--label", "old", "--key", pem) == 0
    _, (info, stored) = Vault.open(str(files.path), PIN.encode()).private_keys()
    assert (info.label, stored.private_numbers()) == ("old", key.private_numbers())


def test_delete_removes_one_key(files: SoftTokenFiles) -> None:
    assert run(files, "delete", "--label", "www") == 0
    assert read_public_keys(str(files.path)) == ()


def test_the_pin_may_come_from_the_environment(files: SoftTokenFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_PIN", PIN)
    arguments = ["keygen", "--token", str(files.path), "--pin-env", "TOKEN_PIN", "--label", "b", "--type", "ecdsa-p384"]
    assert cli.main(arguments) == 0
    assert [key.label for key in read_public_keys(str(files.path))] == ["www", "b"]


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        (["keygen", "--label", "www", "--type", "ecdsa-p256"], 2, "token: expected a new label; there is a key 'www'"),
        (["keygen", "--label", "a b", "--type", "ecdsa-p256"], 2, "label: expected 1 to 64 letters"),
        (["delete", "--label", "mail"], 2, "token: no key 'mail'"),
        (["csr", "--label", "mail", "--subject", "CN=x"], 2, "token: no key 'mail'"),
        (["csr", "--label", "www", "--subject", "x"], 2, "subject: expected an RFC 4514 name"),
        (["csr", "--label", "www", "--subject", "CN=x", "--out", "/nowhere/x"], 1, "/nowhere/x: No such file"),
        (["import", "--label", "k", "--key", "/nowhere/x"], 1, "/nowhere/x: No such file"),
    ],
)
def test_an_error_is_one_line(
    files: SoftTokenFiles, capsys: pytest.CaptureFixture[str], command: list[str], code: int, expected: str
) -> None:
    assert run(files, *command) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hsm: ")
    assert expected in captured.err
    assert captured.err.count("\n") == 1


def test_import_says_why_a_key_cannot_be_stored(
    files: SoftTokenFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none.pem").write_text("no key")
    for pem, expected in (
        (str(tmp_path / "none.pem"), "expected a private key, PEM; found none"),
        (
            write_pem(tmp_path / "a.pem", private_key(KeyType.ECDSA_P256), BestAvailableEncryption(b"secret")),
            "expected a private key that is not encrypted; this one is",
        ),
        (
            write_pem(tmp_path / "b.pem", ed25519.Ed25519PrivateKey.generate(), NoEncryption()),
            "expected an EC or RSA key; got one of another kind",
        ),
    ):
        assert run(files, "import", "--label", "k", "--key", pem) == 2
        assert capsys.readouterr().err == f"hsm: {pem}: {expected}\n"


def test_a_wrong_pin_is_exit_2(files: SoftTokenFiles, capsys: pytest.CaptureFixture[str]) -> None:
    files.pin_file.write_text("guess\n")
    assert run(files, "delete", "--label", "www") == 2
    assert capsys.readouterr().err == f"hsm: {files.path}: the PIN is wrong\n"
    assert len(read_public_keys(str(files.path))) == 1


@pytest.mark.parametrize(
    "arguments", [[], ["list"], ["init", "--token", "t"], ["keygen", "--token", "t", "--type", "dsa"]]
)
def test_bad_usage_is_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: hsm")


def test_runs_as_a_command(files: SoftTokenFiles) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "hsm.cli", "list", "--token", str(files.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("www\tecdsa-p256\t")
    assert result.stderr == ""
