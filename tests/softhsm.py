"""SoftHSM2 tokens in a directory of their own, for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsm.keys import PrivateKey

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
SO_PIN = "87654321"


class SoftHsm:
    """A SoftHSM2 store. A process sees it when `environment` is in its environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        tokens = directory / "tokens"
        tokens.mkdir()
        configuration = directory / "softhsm2.conf"
        configuration.write_text(f"directories.tokendir = {tokens}\nobjectstore.backend = file\nlog.level = ERROR\n")
        self.environment = {"SOFTHSM2_CONF": str(configuration)}

    def add_token(self, label: str, pin: str = "1234") -> None:
        """Make a token."""
        self._util("--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", SO_PIN)

    def delete_token(self, label: str) -> None:
        """Remove a token with all its keys."""
        self._util("--delete-token", "--token", label)

    def import_key(
        self, token: str, key: PrivateKey, label: str, id_: bytes = b"\x01", *, pin: str = "1234", public: bool = True
    ) -> None:
        """Put a private key, and its public one unless told not to, on a token."""
        path = self.directory / "import.pem"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        arguments = ["--import", str(path), "--token", token, "--pin", pin, "--label", label, "--id", id_.hex()]
        self._util(*arguments, *(() if public else ("--no-public-key",)))
        path.unlink()

    def _util(self, *arguments: str) -> None:
        result = subprocess.run(
            ["softhsm2-util", *arguments], env={**os.environ, **self.environment}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
