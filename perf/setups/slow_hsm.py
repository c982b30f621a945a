"""SoftHSM2 behind a PKCS#11 module that takes as long as it is told: the HSM of every set-up that has one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tests.fault_module import FaultModule
from tests.softhsm import MODULE, SoftHsm

PIN = "perf-pin-1234"
KEY_LABEL = "perf"


class SlowHsm:
    """A token that holds the key of a file as `perf`. Whoever has loaded `module` is slowed down by set_latency()."""

    def __init__(self, directory: Path, key_file: Path, label: str) -> None:
        directory.mkdir(parents=True)
        self.label = label
        self._directory = directory
        store = SoftHsm(directory)
        store.add_token(label, PIN)
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
        store.import_key(label, key, KEY_LABEL, pin=PIN)
        self._faults = FaultModule(directory, MODULE, store.environment)
        self.module = self._faults.path
        self.pin_file = directory / "pin"
        self.pin_file.touch(mode=0o600)
        self.pin_file.write_text(PIN)

    def set_latency(self, seconds: float) -> None:
        """Make each C_Sign take so much longer, from now on."""
        self._faults.set_sign_latency(seconds)

    @property
    def uri(self) -> str:
        """The key, for libp11's engine (RFC 7512)."""
        return f"pkcs11:token={self.label};object={KEY_LABEL};type=private"

    def engine_environment(self) -> dict[str, str]:
        """Write an openssl.cnf that loads Debian's libengine-pkcs11-openssl; return the variable that names it.

        The PIN stands in that file, as it does wherever servers reach a token through the engine.
        """
        version = subprocess.run(["openssl", "version", "-e"], check=True, capture_output=True, text=True).stdout
        engines_directory = version.split('"')[1]
        path = self._directory / "openssl.cnf"
        path.touch(mode=0o600)
        path.write_text(
            "openssl_conf = init\n[init]\nengines = engines\n[engines]\npkcs11 = pkcs11\n[pkcs11]\n"
            f"engine_id = pkcs11\ndynamic_path = {engines_directory}/pkcs11.so\n"
            f"MODULE_PATH = {self.module}\nPIN = {PIN}\ninit = 1\n"
        )
        return {"OPENSSL_CONF": str(path)}
