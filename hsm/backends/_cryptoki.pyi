"""The PKCS#11 functions a worker needs (PKCS#11 v2.40 base specification, chapter 5).

Every method may raise CryptokiError, names the C function in it, and releases the GIL during the call.
"""

from __future__ import annotations

class Module:
    """A PKCS#11 library, loaded for good: modules do not survive being unloaded while their threads run."""

    def __init__(self, path: str) -> None:
        """Load it. Raises OSError with the loader's own words."""

    def initialize(self) -> None:
        """C_Initialize with CKF_OS_LOCKING_OK: any thread may call."""

    def finalize(self) -> None:
        """C_Finalize: ends all sessions and the login. No other call may be under way."""

    def slots(self) -> list[int]:
        """Return the slots that have a token, as they are now."""

    def token_info(self, slot: int) -> tuple[bytes, bytes, int]:
        """Return the label and the serial number, blank-padded, and the CKF_* flags."""

    def mechanisms(self, slot: int) -> dict[int, int]:
        """Return the CKF_* flags of each mechanism."""

    def open_session(self, slot: int) -> int:
        """Open a read/write session: AWS CloudHSM's library (Client SDK 5) knows no other kind."""

    def close_session(self, session: int) -> None:
        """Close it."""

    def login(self, session: int, pin: bytearray) -> None:
        """Log the application in as CKU_USER."""

    def find_objects(self, session: int, template: dict[int, bytes], limit: int) -> list[int]:
        """Return the handles of at most `limit` objects that have these attributes."""

    def attribute(self, session: int, object_: int, type_: int) -> bytes | None:
        """Return one attribute, or None when the object has none such or does not show it."""

    def sign(self, session: int, mechanism: int, parameter: bytes, key: int, data: bytes) -> bytes:
        """C_SignInit and C_Sign, with one hand-over of the GIL and a buffer large enough not to ask the length."""

    def generate_key_pair(
        self, session: int, mechanism: int, public: dict[int, bytes], private: dict[int, bytes]
    ) -> tuple[int, int]:
        """Return the handles of a new public and private key."""
