"""The soft token's file: one JSON document, the private keys in it encrypted under the PIN.

A key is PKCS#8 under AES-256-GCM; the AES key comes from the PIN by scrypt (RFC 7914). The additional data binds label,
id, type, usage and public key, so none of them can be changed or exchanged between keys. The `sha256` over the whole
document only tells a damaged file from a wrong PIN: who can write the file can also delete keys or put back an older
one. The file is replaced in one step, so that a reader or a crash never meets half of it.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from hsm.errors import KeyNotFound, PinRefused, TokenFileError
from hsm.keys import PrivateKey, key_type_of, load_public_key, public_key_der
from hsm.messages import KeyInfo, KeyType

FORMAT: Final = "hsm soft token"
VERSION: Final = 1
MAX_FILE_BYTES: Final = 8 << 20
MAX_KEYS: Final = 1000
USAGE: Final = "tls-server"
"""What every key is for; hsm.policy says what such a key signs."""
_LABEL = re.compile(r"[A-Za-z0-9*][A-Za-z0-9._@*-]{0,63}")
_NONCE_BYTES = 12
_SALT_BYTES = 16
_SCRYPT_N = 1 << 15
_SCRYPT_R = 8
_SCRYPT_P = 1
_SCRYPT_N_RANGE = (1 << 15, 1 << 20)
_CHECK_AAD = b"hsm soft token pin check"


@dataclass(frozen=True, slots=True)
class _Sealed:
    """AES-256-GCM output."""

    nonce: bytes
    ciphertext: bytes


@dataclass(frozen=True, slots=True)
class _StoredKey:
    label: str
    id: bytes
    key_type: KeyType
    public_key: bytes
    sealed: _Sealed

    @property
    def aad(self) -> bytes:
        """What AES-GCM binds to the private key."""
        return json.dumps([self.label, self.id.hex(), self.key_type.value, USAGE, _b64(self.public_key)]).encode()


@dataclass(frozen=True, slots=True)
class _Document:
    """The file's content. `check` is an empty text sealed under the PIN's key."""

    scrypt_n: int
    salt: bytes
    check: _Sealed
    keys: tuple[_StoredKey, ...]


class Vault:
    """A soft token's file, opened with its PIN. Any number of processes may have it open."""

    def __init__(self, path: str, aes_key: bytes) -> None:
        """Use `create` or `open`."""
        self._path = path
        self._cipher = AESGCM(aes_key)

    @classmethod
    def create(cls, path: str, pin: bytes | bytearray) -> Vault:
        """Make a token file without keys, of mode 0600. Raises TokenFileError, also if the file is there already."""
        salt = secrets.token_bytes(_SALT_BYTES)
        vault = cls(path, _derive(pin, salt, _SCRYPT_N))
        with _locked(path):
            if os.path.lexists(path):
                raise TokenFileError(f"{path}: expected no such file; it exists")
            _write(path, _Document(_SCRYPT_N, salt, vault._seal(b"", _CHECK_AAD), ()))
        return vault

    @classmethod
    def open(cls, path: str, pin: bytes | bytearray) -> Vault:
        """Open a token file. Takes about 0.1 s, scrypt's.

        Raises PinRefused for a wrong PIN and TokenFileError for a missing or damaged file.
        """
        document = _read(path)
        vault = cls(path, _derive(pin, document.salt, document.scrypt_n))
        try:
            vault._unseal(document.check, _CHECK_AAD)
        except InvalidTag:
            raise PinRefused(f"{path}: the PIN is wrong") from None
        return vault

    def private_keys(self) -> tuple[tuple[KeyInfo, PrivateKey], ...]:
        """Return every key with its private half, as the file is now. Raises TokenFileError."""
        stored = _read(self._path).keys
        return tuple((_key_info(number, key), self._private_key(key)) for number, key in enumerate(stored))

    def add(self, label: str, private_key: PrivateKey) -> KeyInfo:
        """Store a key under a new label.

        Raises:
            ValueError: an unfit label or kind of key.
            TokenFileError: the label is taken, the token is full, or the file cannot be used.
        """
        if not _LABEL.fullmatch(label):
            raise ValueError(f"label: expected 1 to 64 letters, digits or . _ @ * -; got {label!r}")
        public_key = public_key_der(private_key.public_key())
        key_type = key_type_of(private_key)
        bare = _StoredKey(label, hashlib.sha256(public_key).digest()[:8], key_type, public_key, _Sealed(b"", b""))
        pkcs8 = private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        key = replace(bare, sealed=self._seal(pkcs8, bare.aad))
        with _locked(self._path):
            document = _read(self._path)
            if any(other.label == label for other in document.keys):
                raise TokenFileError(f"{self._path}: expected a new label; there is a key {label!r}")
            if len(document.keys) >= MAX_KEYS:
                raise TokenFileError(f"{self._path}: expected fewer than {MAX_KEYS} keys; the token is full")
            _write(self._path, replace(document, keys=(*document.keys, key)))
        return _key_info(len(document.keys), key)

    def delete(self, label: str) -> None:
        """Remove a key for good. Raises KeyNotFound and TokenFileError."""
        with _locked(self._path):
            document = _read(self._path)
            rest = tuple(key for key in document.keys if key.label != label)
            if len(rest) == len(document.keys):
                raise KeyNotFound(f"{self._path}: no key {label!r}")
            _write(self._path, replace(document, keys=rest))

    def _private_key(self, stored: _StoredKey) -> PrivateKey:
        place = f"{self._path}: key {stored.label!r}"
        try:
            private_key = load_der_private_key(self._unseal(stored.sealed, stored.aad), None)
        except InvalidTag:
            raise TokenFileError(f"{place}: expected it as this token stored it; it was changed") from None
        if not isinstance(private_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise TokenFileError(f"{place}: expected an EC or RSA key")
        if public_key_der(private_key.public_key()) != stored.public_key:
            raise TokenFileError(f"{place}: expected the two halves of one key pair")
        return private_key

    def _seal(self, text: bytes, aad: bytes) -> _Sealed:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _Sealed(nonce, self._cipher.encrypt(nonce, text, aad))

    def _unseal(self, sealed: _Sealed, aad: bytes) -> bytes:
        return self._cipher.decrypt(sealed.nonce, sealed.ciphertext, aad)


def read_public_keys(path: str) -> tuple[KeyInfo, ...]:
    """Return the token's keys, public halves only: needs no PIN. Raises TokenFileError."""
    return tuple(_key_info(number, key) for number, key in enumerate(_read(path).keys))


def _key_info(number: int, key: _StoredKey) -> KeyInfo:
    return KeyInfo(number, key.label, key.key_type, key.public_key, key.id)


def _derive(pin: bytes | bytearray, salt: bytes, scrypt_n: int) -> bytes:
    return Scrypt(salt=salt, length=32, n=scrypt_n, r=_SCRYPT_R, p=_SCRYPT_P).derive(pin)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Keep other writers out. On a file of its own, for the token's is replaced."""
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise TokenFileError(f"{path}.lock: expected a file to lock; {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: str) -> _Document:
    try:
        with open(path, "rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenFileError(f"{path}: expected a soft token; {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise TokenFileError(f"{path}: expected at most {MAX_FILE_BYTES} bytes; the file is larger")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise TokenFileError(f"{path}: expected a JSON document; the file is damaged or no soft token") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TokenFileError(f'{path}: format: expected "{FORMAT}"; this is another kind of file')
    if document.get("version") != VERSION:
        raise TokenFileError(f"{path}: version: expected {VERSION}; got {document.get('version')!r}")
    if document.pop("sha256", None) != _checksum(document):
        raise TokenFileError(f"{path}: sha256: expected the checksum of the rest; the file is damaged")
    return _parse(path, document)


def _parse(path: str, document: dict[str, Any]) -> _Document:
    place = "kdf"
    try:
        kdf = document["kdf"]
        scrypt_n = kdf["n"]
        low, high = _SCRYPT_N_RANGE
        if (kdf["name"], kdf["r"], kdf["p"]) != ("scrypt", _SCRYPT_R, _SCRYPT_P) or type(scrypt_n) is not int:
            raise ValueError
        if not low <= scrypt_n <= high or scrypt_n & (scrypt_n - 1):
            raise ValueError
        salt = _unb64(kdf["salt"])
        place = "check"
        check = _parse_sealed(document["check"])
        place = "keys"
        entries = document["keys"]
        if not isinstance(entries, list) or len(entries) > MAX_KEYS:
            raise ValueError
        keys: list[_StoredKey] = []
        for number, entry in enumerate(entries):
            place = f"keys[{number}]"
            keys.append(_parse_key(entry))
            if any(key.label == keys[-1].label for key in keys[:-1]):
                raise ValueError
    except (KeyError, TypeError, ValueError):
        raise TokenFileError(f"{path}: {place}: expected what this version of the format has there") from None
    return _Document(scrypt_n, salt, check, tuple(keys))


def _parse_key(entry: dict[str, Any]) -> _StoredKey:
    """Return one entry of `keys`. Raises KeyError, TypeError or ValueError."""
    public_key = _unb64(entry["public_key"])
    key_type = KeyType(entry["key_type"])
    if entry["usage"] != USAGE or not _LABEL.fullmatch(entry["label"]):
        raise ValueError
    if key_type_of(load_public_key(public_key)) is not key_type:
        raise ValueError
    return _StoredKey(
        entry["label"], bytes.fromhex(entry["id"]), key_type, public_key, _parse_sealed(entry["private_key"])
    )


def _parse_sealed(entry: dict[str, Any]) -> _Sealed:
    sealed = _Sealed(_unb64(entry["nonce"]), _unb64(entry["ciphertext"]))
    if len(sealed.nonce) != _NONCE_BYTES:
        raise ValueError
    return sealed


def _write(path: str, document: _Document) -> None:
    text = {
        "format": FORMAT,
        "version": VERSION,
        "kdf": {
            "name": "scrypt",
            "n": document.scrypt_n,
            "r": _SCRYPT_R,
            "p": _SCRYPT_P,
            "salt": _b64(document.salt),
        },
        "check": _sealed_json(document.check),
        "keys": [
            {
                "label": key.label,
                "id": key.id.hex(),
                "key_type": key.key_type.value,
                "usage": USAGE,
                "public_key": _b64(key.public_key),
                "private_key": _sealed_json(key.sealed),
            }
            for key in document.keys
        ],
    }
    text["sha256"] = _checksum(text)
    _replace_file(path, json.dumps(text, indent=1).encode() + b"\n")


def _replace_file(path: str, content: bytes) -> None:
    """Put `content` in place of the file at `path`, whole or not at all, mode 0600. Raises TokenFileError."""
    directory = os.path.dirname(os.path.abspath(path))
    temporary = f"{path}.{os.getpid()}.new"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)
    except OSError as error:
        raise TokenFileError(f"{path}: cannot be written; {error.strerror}") from None


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _sealed_json(sealed: _Sealed) -> dict[str, str]:
    return {"nonce": _b64(sealed.nonce), "ciphertext": _b64(sealed.ciphertext)}


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unb64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
