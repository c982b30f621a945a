"""The checks around one signature, with a signer that does as it is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import pytest

from hsm import metrics
from hsm.backends.base import Signer
from hsm.errors import KeyNotFound, PinRefused, TokenError
from hsm.keys import public_key_der, scheme_arguments
from hsm.messages import KeyInfo, KeyType, SignatureScheme, SignReply, SignRequest, Status, decode_replies
from hsm.metricstore import MetricStore, read_samples
from hsm.signing import RequestHandler
from tests.tokens import CERTIFICATE_VERIFY, deadline_in, private_key

PSS = SignatureScheme.RSA_PSS_RSAE_SHA256
ECDSA = SignatureScheme.ECDSA_SECP256R1_SHA256
KEYS = tuple(
    KeyInfo(number, kind.value, kind, public_key_der(private_key(kind).public_key()))
    for number, kind in enumerate((KeyType.ECDSA_P256, KeyType.RSA_2048))
)


class ScriptedSigner(Signer):
    """Answers every request with what `script` returns or raises, and counts them."""

    def __init__(self, script: Callable[[SignatureScheme, bytes], bytes]) -> None:
        self.script = script
        self.asked = 0

    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        self.asked += 1
        return self.script(scheme, tbs)


def raising(error: Exception) -> Callable[[SignatureScheme, bytes], bytes]:
    def script(scheme: SignatureScheme, tbs: bytes) -> bytes:
        raise error

    return script


def sign_rsa(scheme: SignatureScheme, tbs: bytes) -> bytes:
    return private_key(KeyType.RSA_2048).sign(tbs, *scheme_arguments(scheme))


@pytest.fixture
def store() -> Iterator[MetricStore]:
    store = MetricStore()
    yield store
    store.close()


def answer(store: MetricStore, signer: Signer, *, key: int = 1, scheme: int = PSS, within_s: float = 60) -> SignReply:
    handler = RequestHandler("hsm-a", KEYS, store)
    request = SignRequest(5, key, scheme, deadline_in(within_s), CERTIFICATE_VERIFY)
    (reply,), _ = decode_replies(handler.answer(signer, request, time.monotonic_ns() - 2_000_000))
    assert reply.id == 5
    assert reply.queue_us >= 2000
    return reply


def counts(store: MetricStore) -> dict[tuple[str, ...], float]:
    families = {family.name: family for family in (metrics.ERRORS, metrics.POLICY_REJECTED)}
    return {sample.labels: sample.values[0] for sample in read_samples(store.fd, families) if sample.values[0]}


def test_a_sound_signature_is_passed_on(store: MetricStore) -> None:
    reply = answer(store, ScriptedSigner(sign_rsa))
    assert reply.status is Status.OK
    assert len(reply.payload) == 256
    assert reply.sign_us > 0
    assert counts(store) == {}


def test_a_faulty_rsa_signature_never_leaves(store: MetricStore) -> None:
    def faulty(scheme: SignatureScheme, tbs: bytes) -> bytes:
        signature = bytearray(sign_rsa(scheme, tbs))
        signature[100] ^= 1
        return bytes(signature)

    reply = answer(store, ScriptedSigner(faulty))
    assert (reply.status, reply.payload) == (Status.RETRY, b"SIGNATURE_INVALID: the token's signature does not verify")
    assert counts(store) == {("hsm-a", "SIGNATURE_INVALID"): 1}


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"within_s": -1}, Status.EXPIRED),
        ({"key": 2}, Status.NO_KEY),
        ({"scheme": ECDSA}, Status.POLICY),
        ({"scheme": 0x0401}, Status.POLICY),
        ({"scheme": 0}, Status.POLICY),
    ],
)
def test_the_token_is_not_asked_for_what_must_not_be_signed(
    store: MetricStore, asked: dict[str, int], status: Status
) -> None:
    signer = ScriptedSigner(sign_rsa)
    assert answer(store, signer, **asked).status is status
    assert signer.asked == 0


@pytest.mark.parametrize(
    ("error", "status", "payload"),
    [
        (TokenError("CKR_DEVICE_ERROR", retryable=True), Status.RETRY, b"CKR_DEVICE_ERROR"),
        (TokenError("CKR_KEY_TYPE_INCONSISTENT", "odd"), Status.ERROR, b"CKR_KEY_TYPE_INCONSISTENT: odd"),
        (TokenError("X", "ü" * 400), Status.ERROR, b"X: " + b"?" * 197),
        (KeyNotFound("no key 'www'"), Status.NO_KEY, b"no key 'www'"),
    ],
)
def test_what_the_token_says_is_passed_on(store: MetricStore, error: Exception, status: Status, payload: bytes) -> None:
    reply = answer(store, ScriptedSigner(raising(error)), key=0, scheme=ECDSA)
    assert (reply.status, reply.payload) == (status, payload)
    expected = {("hsm-a", error.code): 1} if isinstance(error, TokenError) else {}
    assert counts(store) == expected


def test_a_refused_pin_ends_the_worker(store: MetricStore) -> None:
    with pytest.raises(PinRefused):
        answer(store, ScriptedSigner(raising(PinRefused("no"))))


def test_a_fault_of_ours_answers_and_is_logged(store: MetricStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        reply = answer(store, ScriptedSigner(raising(ZeroDivisionError())))
    assert (reply.status, reply.payload) == (Status.ERROR, b"INTERNAL: see the worker's log")
    assert "key 1, scheme rsa_pss_rsae_sha256: signing failed" in caplog.text
