"""The few PKCS#11 calls that python-pkcs11 cannot make as a worker needs them (see hsm.backends.pkcs11_library).

Every method may raise CryptokiError, names the C function in it, and releases the GIL during the call.
"""

from __future__ import annotations

class Module:
    """A PKCS#11 library, loaded for good: modules do not survive being unloaded while their threads run."""

    def __init__(self, path: str) -> None:
        """Load it. Raises OSError with the loader's own words."""

    def initialize(self) -> None:
        """C_Initialize with CKF_OS_LOCKING_OK: any thread may call. Does nothing if that has been done."""

    def finalize(self) -> None:
        """C_Finalize: ends all sessions and the login. No other call may be under way."""

    def login(self, session: int, pin: bytearray) -> None:
        """Log the application in as CKU_USER."""

    def sign(self, session: int, mechanism: int, parameter: bytes, key: int, data: bytes) -> bytes:
        """C_SignInit and C_Sign, with one hand-over of the GIL and a buffer large enough not to ask the length."""
