"""The soft token: keys in an encrypted file, signatures by OpenSSL in this process. For development, and not validated
by anyone; what protects its keys is that only a sealed worker ever opens them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hsm.backends.base import Backend, Signer
from hsm.backends.opening import step
from hsm.keys import PrivateKey, scheme_arguments
from hsm.messages import KeyInfo, SignatureScheme
from hsm.vault import Vault


class SoftSigner(Signer):
    """Signs with private keys in memory."""

    def __init__(self, keys: Sequence[tuple[KeyInfo, PrivateKey]]) -> None:
        self._calls: dict[tuple[int, SignatureScheme], tuple[Callable[..., bytes], tuple[Any, ...]]] = {
            (info.number, scheme): (private_key.sign, scheme_arguments(scheme))
            for info, private_key in keys
            for scheme in info.key_type.schemes
        }

    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        """See Signer.sign. Raises nothing: the key is in memory."""
        sign, arguments = self._calls[key, scheme]
        return sign(tbs, *arguments)


class SoftBackend(Backend):
    """A soft token's file, opened."""

    def __init__(self, path: str, pin: bytes | bytearray) -> None:
        """Decrypt all keys. Raises PinRefused and TokenFileError."""
        step("reading the token's file")
        private_keys = Vault.open(path, pin).private_keys()
        self._keys = tuple(info for info, _ in private_keys)
        self._signers: tuple[SoftSigner, ...] = (SoftSigner(private_keys),)

    @property
    def keys(self) -> tuple[KeyInfo, ...]:
        """The file's keys, in its order."""
        return self._keys

    @property
    def signers(self) -> Sequence[Signer]:
        """One: the work is all CPU, so a core more means a worker more."""
        return self._signers

    def close(self) -> None:
        """Let go of the keys. Their memory is freed, not wiped: the process is about to end."""
        self._signers = ()
