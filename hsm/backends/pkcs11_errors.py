"""What a PKCS#11 token may say (CKR_*), and what is to be done about it."""

from __future__ import annotations

import enum

from pkcs11 import exceptions
from pkcs11.exceptions import PKCS11Error

from hsm.errors import TokenError


class Remedy(enum.Enum):
    """What may help before the same signature is asked for again."""

    NEW_SESSION = enum.auto()
    """Open another PKCS#11 session in place of this one."""
    NEW_LOGIN = enum.auto()
    """Log in and find the keys again."""
    NEW_TOKEN = enum.auto()
    """Find the token again, and all that is on it; another session too."""
    WAIT = enum.auto()
    """Pause: the token is busy."""
    NONE = enum.auto()
    """Nothing: this request cannot be served."""


_NEW_SESSION, _NEW_LOGIN, _NEW_TOKEN, _WAIT = Remedy.NEW_SESSION, Remedy.NEW_LOGIN, Remedy.NEW_TOKEN, Remedy.WAIT

# PKCS#11 v2.40 base specification, section 5.1. When AWS CloudHSM throttles it says CKR_FUNCTION_FAILED (Client SDK 5),
# CKR_OPERATION_ACTIVE (Client SDK 3) or its inner code 0xBB. A code not listed leaves the token's state unknown.
_CODES: dict[int, tuple[str, Remedy]] = {
    0x02: ("CKR_HOST_MEMORY", _NEW_TOKEN),
    0x03: ("CKR_SLOT_ID_INVALID", _NEW_TOKEN),
    0x05: ("CKR_GENERAL_ERROR", _NEW_TOKEN),
    0x06: ("CKR_FUNCTION_FAILED", _WAIT),
    0x07: ("CKR_ARGUMENTS_BAD", Remedy.NONE),
    0x0A: ("CKR_CANT_LOCK", Remedy.NONE),
    0x10: ("CKR_ATTRIBUTE_READ_ONLY", Remedy.NONE),
    0x13: ("CKR_ATTRIBUTE_VALUE_INVALID", Remedy.NONE),
    0x20: ("CKR_DATA_INVALID", Remedy.NONE),
    0x21: ("CKR_DATA_LEN_RANGE", Remedy.NONE),
    0x30: ("CKR_DEVICE_ERROR", _NEW_TOKEN),
    0x31: ("CKR_DEVICE_MEMORY", _NEW_TOKEN),
    0x32: ("CKR_DEVICE_REMOVED", _NEW_TOKEN),
    0x50: ("CKR_FUNCTION_CANCELED", _WAIT),
    0x54: ("CKR_FUNCTION_NOT_SUPPORTED", Remedy.NONE),
    0x60: ("CKR_KEY_HANDLE_INVALID", _NEW_LOGIN),
    0x62: ("CKR_KEY_SIZE_RANGE", Remedy.NONE),
    0x63: ("CKR_KEY_TYPE_INCONSISTENT", Remedy.NONE),
    0x68: ("CKR_KEY_FUNCTION_NOT_PERMITTED", Remedy.NONE),
    0x70: ("CKR_MECHANISM_INVALID", Remedy.NONE),
    0x71: ("CKR_MECHANISM_PARAM_INVALID", Remedy.NONE),
    0x82: ("CKR_OBJECT_HANDLE_INVALID", _NEW_LOGIN),
    0x90: ("CKR_OPERATION_ACTIVE", _NEW_SESSION),
    0x91: ("CKR_OPERATION_NOT_INITIALIZED", _NEW_SESSION),
    0xA0: ("CKR_PIN_INCORRECT", Remedy.NONE),
    0xA1: ("CKR_PIN_INVALID", Remedy.NONE),
    0xA2: ("CKR_PIN_LEN_RANGE", Remedy.NONE),
    0xA3: ("CKR_PIN_EXPIRED", Remedy.NONE),
    0xA4: ("CKR_PIN_LOCKED", Remedy.NONE),
    0xB0: ("CKR_SESSION_CLOSED", _NEW_SESSION),
    0xB1: ("CKR_SESSION_COUNT", _WAIT),
    0xB3: ("CKR_SESSION_HANDLE_INVALID", _NEW_SESSION),
    0xB4: ("CKR_SESSION_PARALLEL_NOT_SUPPORTED", Remedy.NONE),
    0xBB: ("0xBB", _WAIT),
    0xD1: ("CKR_TEMPLATE_INCONSISTENT", Remedy.NONE),
    0xE0: ("CKR_TOKEN_NOT_PRESENT", _NEW_TOKEN),
    0xE1: ("CKR_TOKEN_NOT_RECOGNIZED", _NEW_TOKEN),
    0xE2: ("CKR_TOKEN_WRITE_PROTECTED", Remedy.NONE),
    0x100: ("CKR_USER_ALREADY_LOGGED_IN", Remedy.NONE),
    0x101: ("CKR_USER_NOT_LOGGED_IN", _NEW_LOGIN),
    0x102: ("CKR_USER_PIN_NOT_INITIALIZED", Remedy.NONE),
    0x104: ("CKR_USER_ANOTHER_ALREADY_LOGGED_IN", Remedy.NONE),
    0x150: ("CKR_BUFFER_TOO_SMALL", Remedy.NONE),
    0x190: ("CKR_CRYPTOKI_NOT_INITIALIZED", _NEW_TOKEN),
}

# What python-pkcs11 makes of them. It raises PKCS11Error itself for all others, and for CKR_CRYPTOKI_NOT_INITIALIZED.
_LIBRARY_CLASSES: dict[type[PKCS11Error], int] = {
    exceptions.HostMemory: 0x02,
    exceptions.SlotIDInvalid: 0x03,
    exceptions.GeneralError: 0x05,
    exceptions.FunctionFailed: 0x06,
    exceptions.AttributeReadOnly: 0x10,
    exceptions.AttributeValueInvalid: 0x13,
    exceptions.DeviceError: 0x30,
    exceptions.DeviceMemory: 0x31,
    exceptions.DeviceRemoved: 0x32,
    exceptions.FunctionCancelled: 0x50,
    exceptions.FunctionNotSupported: 0x54,
    exceptions.KeySizeRange: 0x62,
    exceptions.MechanismInvalid: 0x70,
    exceptions.ObjectHandleInvalid: 0x82,
    exceptions.OperationActive: 0x90,
    exceptions.OperationNotInitialized: 0x91,
    exceptions.SessionClosed: 0xB0,
    exceptions.SessionCount: 0xB1,
    exceptions.SessionHandleInvalid: 0xB3,
    exceptions.TemplateInconsistent: 0xD1,
    exceptions.TokenNotPresent: 0xE0,
    exceptions.TokenNotRecognised: 0xE1,
    exceptions.TokenWriteProtected: 0xE2,
    exceptions.UserNotLoggedIn: 0x101,
}

CKR_SESSION_COUNT = 0xB1
_SESSION_GONE = frozenset({0xB0, 0xB3})
CKR_USER_ALREADY_LOGGED_IN = 0x100
CKR_CRYPTOKI_NOT_INITIALIZED = 0x190
PIN_REFUSED = frozenset({0xA0, 0xA1, 0xA2, 0xA3, 0xA4, 0x102})
"""Answers of C_Login that another try with the same PIN cannot change, and may turn into a locked token."""


class CryptokiError(PKCS11Error):
    """A PKCS#11 function did not return CKR_OK."""

    def __init__(self, function: str, value: int | None, detail: str = "") -> None:
        self.function = function
        self.value = value
        """None: not known."""
        self.session_is_gone = value in _SESSION_GONE
        """The session's handle is nobody's now, or another's: some tokens give it to the next that is opened."""
        known = ("unknown", _NEW_TOKEN) if value is None else _CODES.get(value, (f"0x{value:X}", _NEW_TOKEN))
        self.code, self.remedy = known
        """`code` is the CKR's name, or its number where it has none: as in messages and metric labels."""
        self._detail = f"in {function}: {detail}" if detail else f"in {function}"
        super().__init__(f"{self.code}: {self._detail}")

    @classmethod
    def of(cls, function: str, error: PKCS11Error) -> CryptokiError:
        """Return what an exception of python-pkcs11 means."""
        return cls(function, _LIBRARY_CLASSES.get(type(error)), str(error))

    def token_error(self, *, retryable: bool = True) -> TokenError:
        """Return what a client of the token is told."""
        return TokenError(self.code, self._detail, retryable=retryable)
