"""The PKCS#11 backend in this process, on SoftHSM2 behind a module that fails on command."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from hsm import metrics
from hsm.backends.pkcs11 import Pkcs11Backend
from hsm.backends.pkcs11_errors import CryptokiError
from hsm.errors import KeyNotFound, PinRefused, TokenConfigError, TokenError
from hsm.keys import is_signature_valid, load_public_key, public_key_der
from hsm.messages import KeyType, SignatureScheme
from hsm.metricstore import Family, read_samples
from hsm.pki import make_demo_ca
from tests.fault_module import On
from tests.softhsm import FaultyToken
from tests.tokens import CERTIFICATE_VERIFY, private_key

P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
KEYS = {"www": KeyType.ECDSA_P256, "p384": KeyType.ECDSA_P384, "rsa": KeyType.RSA_2048}

CKR_FUNCTION_FAILED = 0x06
CKR_DEVICE_ERROR = 0x30
CKR_DEVICE_REMOVED = 0x32
CKR_KEY_HANDLE_INVALID = 0x60
CKR_OBJECT_HANDLE_INVALID = 0x82
CKR_OPERATION_ACTIVE = 0x90
CKR_PIN_INCORRECT = 0xA0
CKR_SESSION_CLOSED = 0xB0
CKR_SESSION_COUNT = 0xB1
CKR_SESSION_HANDLE_INVALID = 0xB3
CKR_TOKEN_NOT_PRESENT = 0xE0
CKR_USER_NOT_LOGGED_IN = 0x101
VENDOR_DEFINED = 0x80000123
CLOUDHSM_BUSY = 0xBB


@pytest.fixture
def token(tmp_path: Path) -> FaultyToken:
    return FaultyToken(tmp_path)


@pytest.fixture
def open_token(token: FaultyToken) -> Iterator[Callable[..., Pkcs11Backend]]:
    """Open `token`; it is closed in the end."""
    opened = []

    def open_(**options: Any) -> Pkcs11Backend:
        backend = token.open(**options)
        opened.append(backend)
        return backend

    yield open_
    for backend in opened:
        backend.close()


def sign(backend: Pkcs11Backend, signer: int = 0) -> None:
    """Sign with the backend's only key, and see that the signature is good."""
    (key,) = backend.keys
    signature = backend.signers[signer].sign(key.number, P256, CERTIFICATE_VERIFY)
    assert is_signature_valid(load_public_key(key.public_key), P256, CERTIFICATE_VERIFY, signature)


def counted(token: FaultyToken) -> dict[Family, float]:
    """Return the metrics of the token's sessions."""
    samples = read_samples(token.metrics.fd, metrics.FAMILIES)
    assert {sample.labels[0] for sample in samples} == {"hsm"}
    return {sample.family: sample.values[0] for sample in samples}


def test_signs_with_every_scheme_of_every_kind_of_key(tmp_path: Path) -> None:
    token = FaultyToken(tmp_path, {kind.value: kind for kind in KeyType})
    backend = token.open()
    try:
        assert {key.label for key in backend.keys} == {kind.value for kind in KeyType}
        for key in backend.keys:
            assert key.public_key == public_key_der(token.private_keys[key.label].public_key())
            assert key.schemes == key.key_type.schemes
            for scheme in key.schemes:
                signature = backend.signers[1].sign(key.number, scheme, CERTIFICATE_VERIFY)
                assert is_signature_valid(load_public_key(key.public_key), scheme, CERTIFICATE_VERIFY, signature)
    finally:
        backend.close()


def test_finds_keys_by_label_and_by_uri(tmp_path: Path) -> None:
    token = FaultyToken(tmp_path, KEYS)
    for keys, labels in {
        (): {"www", "p384", "rsa"},
        ("www",): {"www"},
        ("pkcs11:object=p384;id=%02", "pkcs11:id=%03"): {"p384", "rsa"},
        ("www", "gone"): {"www"},
    }.items():
        backend = token.open(keys=keys)
        assert {key.label for key in backend.keys} == labels
        backend.close()


def test_announces_no_key_that_two_answer_to(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend], caplog: pytest.LogCaptureFixture
) -> None:
    token.store.import_key("hsm", private_key(KeyType.ECDSA_P256, "other"), "www", b"\x09")
    backend = open_token(keys=["www", "pkcs11:id=%09"])
    assert [key.id for key in backend.keys] == [b"\x09"]
    assert "the token has 2: tell them apart by id=" in caplog.text


def test_takes_the_public_key_from_a_certificate(token: FaultyToken, open_token: Callable[..., Pkcs11Backend]) -> None:
    key = private_key(KeyType.ECDSA_P256, "other")
    token.store.import_key("hsm", key, "bare", b"\x09", public=False)
    leaf = make_demo_ca().issue_leaf(public_key_der(key.public_key()), ["localhost"])
    token.store.import_certificate("hsm", x509.load_pem_x509_certificate(leaf), "anything", b"\x09")
    (info,) = open_token(keys=["bare"]).keys
    assert info.public_key == public_key_der(key.public_key())


def test_takes_an_rsa_public_key_from_the_private_one(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    key = private_key(KeyType.RSA_2048)
    token.store.import_key("hsm", key, "bare", b"\x09", public=False)
    (info,) = open_token(keys=["bare"]).keys
    assert info.public_key == public_key_der(key.public_key())


def test_passes_over_a_key_without_a_public_one(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend], caplog: pytest.LogCaptureFixture
) -> None:
    token.store.import_key("hsm", private_key(KeyType.ECDSA_P256, "other"), "bare", b"\x09", public=False)
    assert [key.label for key in open_token(keys=["www", "bare"]).keys] == ["www"]
    assert "key 'bare' (id 09): expected its public key" in caplog.text


def test_refuses_a_public_key_that_is_another_keys(token: FaultyToken) -> None:
    token.store.import_key("hsm", private_key(KeyType.ECDSA_P256, "other"), "bare", b"\x09", public=False)
    leaf = make_demo_ca().issue_leaf(public_key_der(token.private_keys["www"].public_key()), ["localhost"])
    token.store.import_certificate("hsm", x509.load_pem_x509_certificate(leaf), "anything", b"\x09")
    with pytest.raises(KeyNotFound, match=r"key 'bare': SIGNATURE_INVALID: .* another key's"):
        token.open(keys=["bare"])


def test_serves_tls_1_2_alone_where_the_token_has_no_pss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = FaultyToken(tmp_path, {"rsa": KeyType.RSA_2048})
    token.faults.hide_mechanisms(0x0D, 0x43, 0x44, 0x45)
    backend = token.open()
    (key,) = backend.keys
    backend.close()
    assert {scheme.name for scheme in key.schemes} == {"RSA_PKCS1_SHA256", "RSA_PKCS1_SHA384", "RSA_PKCS1_SHA512"}
    assert "key 'rsa': the token does not sign by RSA-PSS, so the key cannot serve TLS 1.3" in caplog.text


def test_signs_by_hashing_mechanisms(tmp_path: Path) -> None:
    token = FaultyToken(tmp_path, {"rsa": KeyType.RSA_2048})
    token.faults.hide_mechanisms(0x01, 0x0D)
    backend = token.open()
    (key,) = backend.keys
    for scheme in key.key_type.schemes:
        signature = backend.signers[0].sign(key.number, scheme, CERTIFICATE_VERIFY)
        assert is_signature_valid(load_public_key(key.public_key), scheme, CERTIFICATE_VERIFY, signature)
    backend.close()


def test_names_the_missing_mechanism(token: FaultyToken) -> None:
    token.faults.hide_mechanisms(0x1041, *range(0x1042, 0x1047))
    with pytest.raises(KeyNotFound, match="key 'www': expected a token that signs by CKM_ECDSA"):
        token.open()


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"label": "other"}, r"expected one token with label 'other'; got 0 .*label 'hsm'"),
        ({"slot": 12345}, "expected one token with slot 12345; got 0"),
        ({"label": "hsm", "serial": "x"}, "label 'hsm' and serial number 'x'; got 0"),
    ],
)
def test_names_the_token_that_is_not_there(token: FaultyToken, selector: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenError, match=message) as caught:
        token.open(**selector)
    assert caught.value.retryable, "it may be away for a while only"


def test_refuses_to_choose_between_tokens_of_one_label(token: FaultyToken) -> None:
    token.store.add_token("hsm")
    with pytest.raises(TokenConfigError, match="expected one token with label 'hsm'; got 2"):
        token.open()


@pytest.mark.parametrize("module", ["/no/such/module.so", "/lib/x86_64-linux-gnu/libm.so.6"])
def test_names_a_file_that_is_no_module(token: FaultyToken, module: str) -> None:
    token.faults.path = Path(module)
    with pytest.raises(TokenConfigError, match=f"{module}: expected a PKCS#11 module"):
        token.open()


def test_names_the_sessions_a_token_allows(token: FaultyToken) -> None:
    token.faults.fail(CKR_SESSION_COUNT, On.OPEN_SESSION, after=4)
    with pytest.raises(TokenConfigError, match="expected 8 sessions, and one for the login; the token allows 4 in all"):
        token.open(sessions=8)


def test_a_refused_pin_is_tried_once(token: FaultyToken) -> None:
    token.faults.fail(CKR_PIN_INCORRECT, On.LOGIN)
    with pytest.raises(PinRefused, match="the PIN was refused: CKR_PIN_INCORRECT"):
        token.open()
    assert token.faults.get("login_calls") == 1


def test_a_pin_refused_in_recovery_is_never_tried_again(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token()
    token.faults.lose_sessions()
    token.faults.fail(CKR_PIN_INCORRECT, On.LOGIN)
    for signer in (0, 1, 0, 1):
        with pytest.raises(PinRefused):
            sign(backend, signer)
    assert token.faults.get("login_calls") == 2


@pytest.mark.parametrize("on", [On.SIGN, On.SIGN_INIT])
@pytest.mark.parametrize(
    "error",
    [
        CKR_FUNCTION_FAILED,
        CKR_DEVICE_ERROR,
        CKR_DEVICE_REMOVED,
        CKR_KEY_HANDLE_INVALID,
        CKR_OBJECT_HANDLE_INVALID,
        CKR_OPERATION_ACTIVE,
        CKR_SESSION_CLOSED,
        CKR_SESSION_HANDLE_INVALID,
        CKR_TOKEN_NOT_PRESENT,
        CKR_USER_NOT_LOGGED_IN,
        CLOUDHSM_BUSY,
        VENDOR_DEFINED,
    ],
)
def test_signs_in_spite_of_an_error_that_passes(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend], error: int, on: On
) -> None:
    backend = open_token()
    token.faults.fail(error, on, times=2)
    sign(backend)


def test_signs_after_all_sessions_and_the_login_were_lost(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token(sessions=8)
    token.faults.lose_sessions()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda signer: sign(backend, signer), range(8)))
    assert token.faults.get("login_calls") == 2, "one thread logs in for all"
    assert token.faults.get("open_sessions") == 9
    assert counted(token) == {metrics.SESSIONS: 8.0, metrics.SESSION_REOPENS: 8.0}


def test_a_session_that_is_gone_is_not_closed(token: FaultyToken, open_token: Callable[..., Pkcs11Backend]) -> None:
    """A token may have given its handle to a session that another thread has opened since."""
    backend = open_token()
    token.faults.lose_sessions()
    sign(backend)
    sign(backend, 1)
    assert token.faults.get("open_sessions") == 3
    assert token.faults.get("failed_closes") == 0


@pytest.mark.parametrize("on", [On.FIND, On.SLOTS, On.OPEN_SESSION, On.LOGIN])
@pytest.mark.parametrize("error", [CKR_DEVICE_ERROR, CKR_SESSION_HANDLE_INVALID, VENDOR_DEFINED])
def test_recovers_in_spite_of_errors_in_recovery(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend], error: int, on: On
) -> None:
    backend = open_token()
    token.faults.lose_sessions()
    token.faults.fail(error, on, times=2)
    sign(backend)
    sign(backend, 1)
    assert token.faults.get("open_sessions") == 3, "none is forgotten"


def test_initialises_a_module_again_that_has_forgotten_it(open_token: Callable[..., Pkcs11Backend]) -> None:
    backend = open_token()
    backend.module.finalize()
    sign(backend)


def test_what_one_thread_has_won_back_another_does_not_open_again(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    keeper = open_token().token
    failed = keeper.state
    error = CryptokiError("C_Sign", CKR_DEVICE_ERROR)
    keeper.recover(failed, error, sessions_are_gone=False)
    recovered = keeper.state
    assert recovered is not failed
    keeper.recover(failed, error, sessions_are_gone=False)
    assert keeper.state is recovered
    assert token.faults.get("login_calls") == 2


def test_a_token_that_is_away_is_not_asked_all_the_time(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token()
    token.faults.fail(CKR_DEVICE_REMOVED, On.SIGN_INIT)
    for _ in range(200):
        with pytest.raises(TokenError, match="CKR_DEVICE_REMOVED") as caught:
            sign(backend)
        assert caught.value.retryable
    assert token.faults.get("login_calls") < 10
    assert counted(token)[metrics.SESSIONS] == 1, "the one that was asked has been given up"
    token.faults.recover()
    deadline_s = time.monotonic() + 2
    while True:
        try:
            sign(backend)
            break
        except TokenError:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def test_never_signs_with_another_key_of_the_same_label(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token(keys=["www"])
    token.store.delete_key("hsm", "www")
    token.store.import_key("hsm", private_key(KeyType.ECDSA_P256, "new"), "www")
    token.faults.lose_sessions()
    with pytest.raises(KeyNotFound, match="the token no longer has the key that was 'www'"):
        sign(backend)


def test_finds_a_key_again_on_a_token_that_was_restored(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token()
    token.store.delete_key("hsm", "www")
    token.store.import_key("hsm", token.private_keys["www"], "www")
    token.faults.lose_sessions()
    sign(backend)


def test_an_error_that_nothing_helps_is_not_retried(
    token: FaultyToken, open_token: Callable[..., Pkcs11Backend]
) -> None:
    backend = open_token()
    asked = token.faults.get("sign_calls")
    token.faults.fail(0x68, On.SIGN)
    with pytest.raises(TokenError, match="CKR_KEY_FUNCTION_NOT_PERMITTED: in C_Sign") as caught:
        sign(backend)
    assert not caught.value.retryable
    assert token.faults.get("sign_calls") == asked + 1
