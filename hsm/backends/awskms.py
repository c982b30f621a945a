"""Keys in AWS KMS: each signature is a call of its Sign API over HTTPS.

The credentials are whatever botocore finds: the instance's role, a profile, the environment. botocore is an optional
dependency (`pip install tlsproxy[aws]`), imported by the worker of such a token only.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from hsm.backends.base import Backend, Signer
from hsm.backends.opening import step
from hsm.errors import KeyNotFound, TokenConfigError, TokenError
from hsm.keys import key_type_of, load_public_key
from hsm.messages import KeyInfo, SignatureScheme

_ALGORITHMS = {
    SignatureScheme.RSA_PKCS1_SHA256: "RSASSA_PKCS1_V1_5_SHA_256",
    SignatureScheme.RSA_PKCS1_SHA384: "RSASSA_PKCS1_V1_5_SHA_384",
    SignatureScheme.RSA_PKCS1_SHA512: "RSASSA_PKCS1_V1_5_SHA_512",
    SignatureScheme.RSA_PSS_RSAE_SHA256: "RSASSA_PSS_SHA_256",
    SignatureScheme.RSA_PSS_RSAE_SHA384: "RSASSA_PSS_SHA_384",
    SignatureScheme.RSA_PSS_RSAE_SHA512: "RSASSA_PSS_SHA_512",
    SignatureScheme.ECDSA_SECP256R1_SHA256: "ECDSA_SHA_256",
    SignatureScheme.ECDSA_SECP384R1_SHA384: "ECDSA_SHA_384",
}
_THROTTLED = frozenset({"ThrottlingException", "LimitExceededException", "TooManyRequestsException"})
_NOT_FOUND = frozenset({"NotFoundException", "InvalidArnException"})
# Faults of the request itself, which another region would find too. All else is worth asking another token.
_FINAL = frozenset({"ValidationException", "InvalidKeyUsageException"})
_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.02
"""Doubles with each attempt, and is shortened at random: 0.3 s at most in all, well inside a handshake's deadline."""
_CONNECT_TIMEOUT_S = 1.0
_READ_TIMEOUT_S = 1.5

_log = logging.getLogger(__name__)


class AwsKmsBackend(Backend):
    """The keys named, in one region of KMS."""

    def __init__(self, keys: Sequence[str], *, region: str, endpoint_url: str | None, sessions: int) -> None:
        """Ask KMS for the public half of each key. `keys` are key ids, ARNs or `alias/NAME`; `sessions` of them sign
        at a time.

        Raises:
            TokenConfigError: botocore is not installed, or finds no credentials.
            KeyNotFound: none of the keys can sign for TLS.
            TokenError: KMS cannot be reached, or refuses.
        """
        self._call = _Caller(region, endpoint_url, sessions)
        infos: list[KeyInfo] = []
        for name in keys:
            info = self._key_info(len(infos), name)
            if info is not None:
                infos.append(info)
        if not infos:
            raise KeyNotFound(f"expected one of {', '.join(keys) or 'the keys of certificates'} in KMS; got none")
        self._keys = tuple(infos)
        self._signers = tuple(AwsKmsSigner(self._call, self._keys) for _ in range(sessions))

    @property
    def keys(self) -> tuple[KeyInfo, ...]:
        """The keys, in the order given, labelled as they were named."""
        return self._keys

    @property
    def signers(self) -> Sequence[Signer]:
        """One for each HTTPS connection."""
        return self._signers

    def close(self) -> None:
        """Let go of the connections."""
        self._call.close()

    def _key_info(self, number: int, name: str) -> KeyInfo | None:
        """Return what KMS tells of a key, or None, with the reason logged, if it cannot serve TLS."""
        step("GetPublicKey")
        try:
            answer = self._call("get_public_key", KeyId=name)
            if answer["KeyUsage"] != "SIGN_VERIFY":
                raise ValueError(f"expected KeyUsage SIGN_VERIFY; got {answer['KeyUsage']}")
            key_type = key_type_of(load_public_key(answer["PublicKey"]))
        except (KeyNotFound, ValueError) as error:
            _log.error("key %r: %s", name, error)
            return None
        offered = set(answer["SigningAlgorithms"])
        schemes = tuple(scheme for scheme in key_type.schemes if _ALGORITHMS[scheme] in offered)
        return KeyInfo(number, name, key_type, answer["PublicKey"], schemes=schemes)


class AwsKmsSigner(Signer):
    """One connection's worth of signatures."""

    def __init__(self, call: _Caller, keys: Sequence[KeyInfo]) -> None:
        self._call = call
        self._names = [key.label for key in keys]

    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        """See Signer.sign. KMS hashes `tbs` itself, and answers ECDSA as DER."""
        answer = self._call(
            "sign", KeyId=self._names[key], Message=tbs, MessageType="RAW", SigningAlgorithm=_ALGORITHMS[scheme]
        )
        signature: bytes = answer["Signature"]
        return signature


class _Caller:
    """Calls KMS, with its errors in our terms, and again after a pause where it throttles. Threads may share it."""

    def __init__(self, region: str, endpoint_url: str | None, connections: int) -> None:
        try:
            import botocore.config
            import botocore.exceptions
            import botocore.session
        except ImportError:
            raise TokenConfigError(
                "kind awskms: expected botocore (pip install tlsproxy[aws]); not installed"
            ) from None
        self._botocore_error = botocore.exceptions.BotoCoreError
        self._client_error = botocore.exceptions.ClientError
        config = botocore.config.Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            max_pool_connections=connections,
            # Its own retries know no deadline and may take 20 s.
            retries={"total_max_attempts": 1},
        )
        step("finding AWS credentials")
        try:
            session = botocore.session.get_session()
            if session.get_credentials() is None:
                raise TokenConfigError("kind awskms: expected AWS credentials (a role, a profile, ...); got none")
            self._client = session.create_client("kms", region_name=region, endpoint_url=endpoint_url, config=config)
        except (self._botocore_error, ValueError) as error:
            raise TokenConfigError(f"kind awskms: {error}") from None

    def __call__(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer. Raises KeyNotFound and TokenError."""
        call: Callable[..., dict[str, Any]] = getattr(self._client, operation)
        for attempt in range(_ATTEMPTS):
            try:
                return call(**arguments)
            except self._client_error as error:
                code = error.response["Error"]["Code"]
                if code in _NOT_FOUND:
                    raise KeyNotFound(f"KMS has no key {arguments['KeyId']!r} in this region") from None
                if code not in _THROTTLED or attempt == _ATTEMPTS - 1:
                    raise TokenError(code, f"in {operation}", retryable=code not in _FINAL) from None
            except self._botocore_error as error:
                raise TokenError(type(error).__name__, f"in {operation}", retryable=True) from None
            time.sleep(_FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))  # noqa: S311
        raise AssertionError

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
