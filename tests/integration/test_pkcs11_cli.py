"""The `hsm` command on a PKCS#11 token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509

from hsm.keys import public_key_der
from hsm.messages import KeyType, keys_from_json
from tests.fault_module import On
from tests.softhsm import FaultyToken


@pytest.fixture
def token(tmp_path: Path) -> FaultyToken:
    return FaultyToken(tmp_path)


def hsm(token: FaultyToken, command: str, *arguments: str, select: tuple[str, ...] = ("--token-label", "hsm")) -> str:
    """Run a command that is to succeed; return what it prints."""
    result = run(token, command, *arguments, select=select)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def run(
    token: FaultyToken, command: str, *arguments: str, select: tuple[str, ...] = ("--token-label", "hsm")
) -> subprocess.CompletedProcess[str]:
    at = ["--module", str(token.faults.path), *select, "--pin-file", str(token.pin_file)]
    return subprocess.run(
        [sys.executable, "-m", "hsm.cli", command, *at, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("kind", [KeyType.ECDSA_P384, KeyType.RSA_2048])
def test_makes_a_key_that_a_worker_signs_with_and_a_request_for_its_certificate(
    token: FaultyToken, kind: KeyType
) -> None:
    made = hsm(token, "keygen", "--label", "new key", "--type", kind.value)
    assert made.split("\t")[:2] == ["new key", kind.value]
    assert made in hsm(token, "list")
    pem = hsm(token, "csr", "--label", "new key", "--subject", "CN=localhost", "--dns", "localhost")
    request = x509.load_pem_x509_csr(pem.encode())
    assert request.is_signature_valid
    with token.worker(keys=("new key",)) as worker:
        (key,) = keys_from_json(worker.status["keys"])
    assert key.public_key == public_key_der(request.public_key())  # type: ignore[arg-type]


def test_lists_what_is_on_the_token(token: FaultyToken) -> None:
    (line,) = hsm(token, "list").splitlines()
    assert line.split("\t")[:3] == ["www", "ecdsa-p256", "01"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["keygen", "--label", "www", "--type", "ecdsa-p256"],
            "expected a label that is not in use on the token; got 'www'",
        ),
        (["csr", "--label", "other", "--subject", "CN=x"], "expected one of other; the token has none"),
    ],
)
def test_says_in_one_line_what_is_wrong(token: FaultyToken, arguments: list[str], message: str) -> None:
    result = run(token, *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"hsm: {message}"
    assert "Traceback" not in result.stderr


def test_wants_to_know_which_token(token: FaultyToken) -> None:
    result = run(token, "list", select=())
    assert result.returncode == 2
    assert result.stderr == "hsm: expected --token-label, --token-serial or --slot with --module; got none\n"


def test_a_refused_pin_is_tried_once(token: FaultyToken) -> None:
    token.faults.fail(0xA0, On.LOGIN)
    result = run(token, "list")
    assert (result.returncode, result.stderr) == (
        2,
        "hsm: token with label 'hsm': the PIN was refused: CKR_PIN_INCORRECT\n",
    )
    assert token.faults.get("login_calls") == 1
