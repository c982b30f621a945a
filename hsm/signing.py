"""From a request to its reply: every check a worker makes around one signature, whoever calls the token.

In this order: is there time left, is there such a key, does it sign with this scheme, does the policy allow these
bytes; then the token signs; then an RSA signature is verified before it leaves, for a faulty one computed by the
Chinese remainder theorem gives the private key away (Boneh, DeMillo and Lipton, 1997).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from time import monotonic_ns

from hsm import metrics
from hsm.backends.base import Signer
from hsm.errors import KeyNotFound, PinRefused, PolicyRejected, TokenError
from hsm.keys import PublicKey, is_signature_valid, load_public_key
from hsm.messages import REPLY_HEADER, KeyInfo, SignatureScheme, SignRequest, Status
from hsm.metricstore import Family, MetricStore
from hsm.policy import RULES, check_tls_server

_MAX_REASON_BYTES = 200
_MAX_US = (1 << 32) - 1
_KEY_SCHEME_RULE = "key-scheme"
"""The rule of the policy that is kept here: a key signs with its own schemes."""

_log = logging.getLogger(__name__)


class RequestHandler:
    """Answers requests for one token's keys, and counts what the policy and the token refuse. Threads may share it."""

    def __init__(self, token: str, keys: Sequence[KeyInfo], store: MetricStore) -> None:
        """`store` may be used elsewhere too, but only slots that were registered before the first request."""
        self._token = token
        self._numbers = frozenset(key.number for key in keys)
        self._verifiers: dict[tuple[int, int], PublicKey | None] = {
            (key.number, scheme): load_public_key(key.public_key) if key.key_type.is_rsa else None
            for key in keys
            for scheme in key.schemes
        }
        self._store = store
        self._store_lock = threading.Lock()
        for rule in (*RULES, _KEY_SCHEME_RULE):
            store.counter(metrics.POLICY_REJECTED, (rule,))

    def answer(self, signer: Signer, request: SignRequest, received_ns: int) -> bytes:
        """Return the reply frame. `received_ns` is when the request arrived, on CLOCK_MONOTONIC.

        Raises PinRefused: the worker must end.
        """
        start_ns = monotonic_ns()
        if start_ns >= request.deadline_ns:
            return encode_outcome(request, Status.EXPIRED, b"", start_ns - received_ns)
        status, payload = self._outcome(signer, request)
        return encode_outcome(request, status, payload, start_ns - received_ns, monotonic_ns() - start_ns)

    def _outcome(self, signer: Signer, request: SignRequest) -> tuple[Status, bytes]:
        try:
            verifier = self._verifiers[request.key, request.scheme]
        except KeyError:
            if request.key in self._numbers:
                return self._policy_rejected(_KEY_SCHEME_RULE)
            return Status.NO_KEY, b"no key of this number"
        scheme = SignatureScheme(request.scheme)
        try:
            check_tls_server(scheme, request.tbs)
            signature = signer.sign(request.key, scheme, request.tbs)
            if verifier is not None and not is_signature_valid(verifier, scheme, request.tbs, signature):
                raise TokenError("SIGNATURE_INVALID", "the token's signature does not verify", retryable=True)
        except PolicyRejected as error:
            return self._policy_rejected(error.rule)
        except TokenError as error:
            self._count(metrics.ERRORS, (self._token, error.code))
            return Status.RETRY if error.retryable else Status.ERROR, _reason(error)
        except KeyNotFound as error:
            return Status.NO_KEY, _reason(error)
        except PinRefused:
            raise
        except Exception:
            # A fault of ours in one request must not end the worker: sent again, it would end the next one too.
            _log.exception("key %d, scheme %s: signing failed", request.key, scheme.label)
            return Status.ERROR, b"INTERNAL: see the worker's log"
        return Status.OK, signature

    def _policy_rejected(self, rule: str) -> tuple[Status, bytes]:
        self._count(metrics.POLICY_REJECTED, (rule,))
        return Status.POLICY, rule.encode()

    def _count(self, family: Family, labels: tuple[str, ...]) -> None:
        with self._store_lock:
            self._store.values[self._store.counter(family, labels)] += 1.0


def encode_outcome(request: SignRequest, status: Status, payload: bytes, queue_ns: int, sign_ns: int = 0) -> bytes:
    """Return the reply frame to `request`."""
    queue_us = min(queue_ns // 1000, _MAX_US)
    sign_us = min(sign_ns // 1000, _MAX_US)
    return REPLY_HEADER.pack(request.id, len(payload), status, queue_us, sign_us) + payload


def _reason(error: Exception) -> bytes:
    return str(error).encode("ascii", "replace")[:_MAX_REASON_BYTES]
