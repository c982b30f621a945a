"""What a worker needs of a token, whatever its kind.

A backend opens its token once, before any thread starts, and hands out one Signer for each signature it can make at a
time. A Signer belongs to one thread.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from hsm.messages import KeyInfo, SignatureScheme


class Signer(abc.ABC):
    """Signs, one signature at a time."""

    @abc.abstractmethod
    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        """Return the signature of `tbs` as TLS wants it: ECDSA as a DER SEQUENCE, RSA as an octet string.

        `key` is a KeyInfo.number of this backend and `scheme` one of its key type's schemes: the worker checks both.

        Raises:
            KeyNotFound: the token no longer has the key.
            PinRefused: the token refuses the PIN; the worker ends, for good.
            TokenError: anything else the token says; `retryable` if another token should be asked.
        """


class Backend(abc.ABC):
    """An opened token."""

    @property
    @abc.abstractmethod
    def keys(self) -> tuple[KeyInfo, ...]:
        """The keys that can sign for TLS, numbered from 0."""

    @property
    @abc.abstractmethod
    def signers(self) -> Sequence[Signer]:
        """One for each signature the token can make at a time."""

    @property
    def is_lost(self) -> bool:
        """Nothing has helped for a while; a new process, which loads the token's library anew, might."""
        return False

    @abc.abstractmethod
    def close(self) -> None:
        """Log out and let go of the token."""
