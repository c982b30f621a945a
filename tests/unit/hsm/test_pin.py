from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hsm.errors import TokenConfigError
from hsm.pin import create_pin_file, read_pin, wipe


def pin_file(directory: Path, content: bytes, mode: int = 0o600) -> str:
    path = directory / "pin"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("content", "pin"),
    [(b"1234\n", b"1234"), (b"1234", b"1234"), (b" 12 34 \r\n", b" 12 34 "), (b"x" * 255 + b"\r\n", b"x" * 255)],
)
def test_the_pin_is_the_file_without_its_line_end(tmp_path: Path, content: bytes, pin: bytes) -> None:
    assert read_pin(pin_file(tmp_path, content), None) == pin


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_owner_and_group_may_read_the_file(tmp_path: Path, mode: int) -> None:
    assert read_pin(pin_file(tmp_path, b"1234", mode), None) == b"1234"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(TokenConfigError, match=f"closed to others.*got {mode:04o}"):
        read_pin(pin_file(tmp_path, b"1234", mode), None)


@pytest.mark.parametrize(
    ("content", "found"), [(b"", "none"), (b"\n", "none"), (b"x" * 256, "256"), (b"x" * 5000, "258")]
)
def test_a_pin_has_1_to_255_bytes(tmp_path: Path, content: bytes, found: str) -> None:
    with pytest.raises(TokenConfigError, match=f"expected a PIN of 1 to 255 bytes; got {found}"):
        read_pin(pin_file(tmp_path, content), None)


def test_a_pin_comes_from_a_pipe_too() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"1234\n")
    os.close(writer)
    assert read_pin(f"/dev/fd/{reader}", None) == b"1234"
    os.close(reader)


def test_the_error_names_the_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TokenConfigError, match="/pin: expected the token's PIN; No such file or directory"):
        read_pin(str(tmp_path / "pin"), None)
    with pytest.raises(TokenConfigError, match="expected the token's PIN; Is a directory"):
        read_pin(str(tmp_path), None)


def test_a_pin_from_the_environment_is_taken_out_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_PIN", "1234")
    assert read_pin(None, "TOKEN_PIN") == b"1234"
    assert "TOKEN_PIN" not in os.environ
    with pytest.raises(TokenConfigError, match=r"environment variable TOKEN_PIN: .* it is not set"):
        read_pin(None, "TOKEN_PIN")


def test_wiping_overwrites_in_place() -> None:
    secret = bytearray(b"1234")
    with memoryview(secret) as same_memory:
        wipe(secret)
        assert same_memory == bytes(4)


def test_a_new_pin_file_is_random_and_private_and_never_replaces_one(tmp_path: Path) -> None:
    first, second = str(tmp_path / "1"), str(tmp_path / "2")
    create_pin_file(first)
    create_pin_file(second)
    assert stat.S_IMODE(os.stat(first).st_mode) == 0o600
    assert len(read_pin(first, None)) == 32
    assert read_pin(first, None) != read_pin(second, None)
    with pytest.raises(FileExistsError):
        create_pin_file(first)
