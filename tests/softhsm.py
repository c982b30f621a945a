"""SoftHSM2 tokens in a directory of their own, for tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsm.backends.pkcs11 import Pkcs11Backend
from hsm.backends.pkcs11_token import TokenSelector
from hsm.keys import PrivateKey
from hsm.launcher import Pkcs11Token
from hsm.messages import KeyType
from hsm.metricstore import MetricStore
from tests.fault_module import FaultModule
from tests.tokens import WorkerProcess, private_key

MODULE = "/usr/lib/softhsm/libsofthsm2.so"
PIN = "1234"
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

    def add_token(self, label: str, pin: str = PIN) -> None:
        """Make a token."""
        self._util("--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", SO_PIN)

    def delete_key(self, token: str, label: str) -> None:
        """Remove a key pair."""
        for type_ in ("privkey", "pubkey"):
            self._tool(token, "--delete-object", "--type", type_, "--label", label)

    def import_key(
        self, token: str, key: PrivateKey, label: str, id_: bytes = b"\x01", *, pin: str = PIN, public: bool = True
    ) -> None:
        """Put a private key, and its public one unless told not to, on a token."""
        path = self.directory / "import.pem"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        arguments = ["--import", str(path), "--token", token, "--pin", pin, "--label", label, "--id", id_.hex()]
        self._util(*arguments, *(() if public else ("--no-public-key",)))
        path.unlink()

    def import_certificate(self, token: str, certificate: x509.Certificate, label: str, id_: bytes) -> None:
        """Put a certificate object on a token."""
        path = self.directory / "import.der"
        path.write_bytes(certificate.public_bytes(Encoding.DER))
        self._tool(token, "--write-object", str(path), "--type", "cert", "--label", label, "--id", id_.hex())
        path.unlink()

    def _util(self, *arguments: str) -> None:
        self._run("softhsm2-util", *arguments)

    def _tool(self, token: str, *arguments: str) -> None:
        self._run("pkcs11-tool", "--module", MODULE, "--token-label", token, "--login", "--pin", PIN, *arguments)

    def _run(self, *command: str) -> None:
        result = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


class FaultyToken:
    """A SoftHSM2 token `hsm` of its own with keys from `tests.tokens.private_key`, behind the fault module."""

    def __init__(self, directory: Path, keys: Mapping[str, KeyType] | None = None, name: str = "hsm") -> None:
        self.directory = directory / name
        self.directory.mkdir()
        self.name = name
        self.store = SoftHsm(self.directory)
        self.store.add_token(name)
        self.private_keys = {
            label: private_key(kind, label) for label, kind in (keys or {"www": KeyType.ECDSA_P256}).items()
        }
        for number, (label, key) in enumerate(self.private_keys.items(), 1):
            self.store.import_key(name, key, label, bytes([number]))
        self.faults = FaultModule(self.directory, MODULE, self.store.environment)
        self.metrics = MetricStore()
        """Where `open` counts."""
        self.pin_file = self.directory / "pin"
        self.pin_file.touch(mode=0o600)
        self.pin_file.write_text(PIN + "\n")

    def open(self, *, sessions: int = 2, keys: Sequence[str] = (), **selector: Any) -> Pkcs11Backend:
        """Open the token in this process. SoftHSM2 is one for the process: close this before another is opened."""
        return Pkcs11Backend(
            str(self.faults.path),
            TokenSelector(**(selector or {"label": self.name})),
            bytearray(PIN.encode()),
            sessions=sessions,
            key_references=keys,
            name=self.name,
            store=self.metrics,
        )

    def launchable(self, **fields: Any) -> Pkcs11Token:
        """Return the token for a WorkerGroup."""
        return Pkcs11Token(
            **{
                "name": self.name,
                "module": str(self.faults.path),
                "token_label": self.name,
                "pin_file": str(self.pin_file),
                **fields,
            }
        )

    @contextlib.contextmanager
    def worker(self, **fields: Any) -> Iterator[WorkerProcess]:
        """Run a real worker while the context lasts."""
        identity = {"kind": "pkcs11", "token": self.name, "module": str(self.faults.path), "token_label": self.name}
        worker = WorkerProcess(self.directory, **{**identity, "pin_file": str(self.pin_file), **fields})
        try:
            yield worker
        finally:
            worker.process.kill()
            worker.wait()
