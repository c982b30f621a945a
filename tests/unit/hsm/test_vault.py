from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from hsm.errors import KeyNotFound, PinRefused, TokenFileError
from hsm.keys import generate_private_key, public_key_der
from hsm.messages import KeyType
from hsm.vault import MAX_FILE_BYTES, Vault, read_public_keys
from tests.custody import private_key_patterns
from tests.tokens import PIN, SoftTokenFiles, make_soft_token, private_key

KEYS = {"www": KeyType.ECDSA_P256, "mail": KeyType.ECDSA_P384, "old": KeyType.RSA_2048}


@pytest.fixture
def files(tmp_path: Path) -> SoftTokenFiles:
    return make_soft_token(tmp_path, KEYS)


def open_vault(files: SoftTokenFiles) -> Vault:
    return Vault.open(str(files.path), PIN.encode())


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the document as somebody would who also puts the checksum right."""
    document = json.loads(path.read_text())
    change(document)
    del document["sha256"]
    document["sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(document))


def test_gives_back_the_keys_it_was_given(files: SoftTokenFiles) -> None:
    found = open_vault(files).private_keys()
    assert [(info.number, info.label, info.key_type) for info, _ in found] == [
        (number, label, kind) for number, (label, kind) in enumerate(KEYS.items())
    ]
    for info, key in found:
        assert key.private_numbers() == files.private_keys[info.label].private_numbers()
        assert info.public_key == public_key_der(key.public_key())
        assert len(info.id) == 8


def test_public_keys_need_no_pin(files: SoftTokenFiles) -> None:
    assert read_public_keys(str(files.path)) == tuple(info for info, _ in open_vault(files).private_keys())


def test_the_file_is_its_owners_and_shows_no_private_key(files: SoftTokenFiles) -> None:
    assert stat.S_IMODE(files.path.stat().st_mode) == 0o600
    content = files.path.read_bytes()
    decoded = b"".join(base64.b64decode(entry["private_key"]["ciphertext"]) for entry in json.loads(content)["keys"])
    for key in files.private_keys.values():
        for pattern in private_key_patterns(key).values():
            assert pattern not in content
            assert pattern not in decoded
            assert base64.b64encode(pattern)[4:-4] not in content


def test_each_sealing_has_a_nonce_of_its_own(files: SoftTokenFiles) -> None:
    document = json.loads(files.path.read_text())
    nonces = [document["check"]["nonce"], *(entry["private_key"]["nonce"] for entry in document["keys"])]
    assert len(set(nonces)) == len(KEYS) + 1


def test_refuses_a_wrong_pin(files: SoftTokenFiles) -> None:
    with pytest.raises(PinRefused, match="the PIN is wrong") as caught:
        Vault.open(str(files.path), b"guess")
    assert "guess" not in str(caught.value)


def test_a_deleted_key_is_gone_and_the_others_stay(files: SoftTokenFiles) -> None:
    vault = open_vault(files)
    vault.delete("mail")
    assert [info.label for info, _ in vault.private_keys()] == ["www", "old"]
    with pytest.raises(KeyNotFound, match="no key 'mail'"):
        vault.delete("mail")


def test_refuses_a_label_that_is_taken_and_an_existing_file(files: SoftTokenFiles) -> None:
    before = files.path.read_bytes()
    with pytest.raises(TokenFileError, match="there is a key 'www'"):
        open_vault(files).add("www", private_key(KeyType.ECDSA_P256))
    with pytest.raises(TokenFileError, match="expected no such file"):
        Vault.create(str(files.path), PIN.encode())
    assert files.path.read_bytes() == before


@pytest.mark.parametrize("label", ["", "a b", "a/b", "-a", "a\n", "ü", "x" * 65])
def test_refuses_an_unfit_label(files: SoftTokenFiles, label: str) -> None:
    with pytest.raises(ValueError, match="label: expected 1 to 64 letters"):
        open_vault(files).add(label, private_key(KeyType.ECDSA_P256))


def test_refuses_a_key_that_cannot_serve_tls_here(files: SoftTokenFiles) -> None:
    with pytest.raises(ValueError, match="expected a key of type"):
        open_vault(files).add("k1", ec.generate_private_key(ec.SECP256K1()))


def test_writers_beside_each_other_lose_nothing(tmp_path: Path) -> None:
    files = make_soft_token(tmp_path)
    labels = [f"key-{number}" for number in range(24)]

    def add(label: str) -> None:
        Vault(str(files.path), bytes(32)).add(label, generate_private_key(KeyType.ECDSA_P256))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, labels))
    assert {key.label for key in read_public_keys(str(files.path))} == {"www", *labels}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token", "token.lock", "token.pin"]


def test_a_write_that_fails_leaves_the_file_as_it_was(files: SoftTokenFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    vault = open_vault(files)
    before = files.path.read_bytes()

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(TokenFileError, match="cannot be written; No space left on device"):
            vault.add("new", private_key(KeyType.ECDSA_P256))
    assert files.path.read_bytes() == before
    assert not list(files.path.parent.glob("*.new"))


@pytest.mark.parametrize("position", [0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_damage_is_told_from_a_wrong_pin(files: SoftTokenFiles, position: float) -> None:
    content = bytearray(files.path.read_bytes())
    content[int(len(content) * position)] ^= 1
    files.path.write_bytes(content)
    with pytest.raises(TokenFileError) as caught:
        open_vault(files)
    assert str(caught.value).startswith(str(files.path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a JSON document"),
        (b"\xff", "expected a JSON document"),
        (b"[" * 100_000, "expected a JSON document"),
        (b"[]", "this is another kind of file"),
        (b'{"format": "hsm soft token", "version": 2}', "version: expected 1; got 2"),
        (b'{"format": "hsm soft token", "version": 1}', "the file is damaged"),
        (b" " * (MAX_FILE_BYTES + 1), "the file is larger"),
    ],
    ids=["empty", "binary", "deep", "list", "version", "no checksum", "large"],
)
def test_says_what_is_wrong_with_another_file(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(TokenFileError, match=expected):
        read_public_keys(str(path))


def set_at(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change that puts the last argument where the others lead."""

    def change(document: Any) -> None:
        *path, last, value = place
        for step in path:
            document = document[step]
        document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (set_at("kdf", "n", 1 << 14), "kdf"),
        (set_at("kdf", "n", (1 << 15) + 1), "kdf"),
        (set_at("kdf", "n", 1 << 40), "kdf"),
        (set_at("kdf", "n", True), "kdf"),
        (set_at("kdf", "r", 1 << 20), "kdf"),
        (set_at("kdf", "name", "none"), "kdf"),
        (set_at("kdf", "salt", 1), "kdf"),
        (set_at("check", "nonce", "AAAA"), "check"),
        (set_at("check", None), "check"),
        (set_at("keys", {}), "keys"),
        (set_at("keys", 1), "keys"),
        (set_at("keys", [{}] * 1001), "keys"),
        (set_at("keys", 1, "label", "www"), r"keys\[1\]"),
        (set_at("keys", 1, "label", "a b"), r"keys\[1\]"),
        (set_at("keys", 1, "label", 1), r"keys\[1\]"),
        (set_at("keys", 2, "usage", "any"), r"keys\[2\]"),
        (set_at("keys", 0, "key_type", "rsa-2048"), r"keys\[0\]"),
        (set_at("keys", 0, "key_type", []), r"keys\[0\]"),
        (set_at("keys", 0, "public_key", "AAAA"), r"keys\[0\]"),
        (set_at("keys", 0, "id", "x"), r"keys\[0\]"),
        (set_at("keys", 0, 7), r"keys\[0\]"),
    ],
)
def test_names_the_place_of_what_it_does_not_understand(
    files: SoftTokenFiles, change: Callable[[dict[str, Any]], None], place: str
) -> None:
    rewrite(files.path, change)
    with pytest.raises(TokenFileError, match=f"{place}: expected"):
        read_public_keys(str(files.path))


@pytest.mark.parametrize(
    "change",
    [
        set_at("keys", 0, "label", "mail2"),
        set_at("keys", 0, "id", "00"),
        set_at(
            "keys",
            0,
            "public_key",
            base64.b64encode(public_key_der(private_key(KeyType.ECDSA_P256).public_key())).decode(),
        ),
    ],
    ids=["label", "id", "public key"],
)
def test_an_edited_key_is_not_used(files: SoftTokenFiles, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(files.path, change)
    with pytest.raises(TokenFileError, match="expected it as this token stored it; it was changed"):
        open_vault(files).private_keys()


def test_exchanged_keys_are_not_used(files: SoftTokenFiles) -> None:
    def exchange(document: dict[str, Any]) -> None:
        first, second, _ = document["keys"]
        first["private_key"], second["private_key"] = second["private_key"], first["private_key"]

    rewrite(files.path, exchange)
    with pytest.raises(TokenFileError, match="key 'www': expected it as this token stored it"):
        open_vault(files).private_keys()
