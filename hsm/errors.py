"""The errors of the HSM side. `retryable` says whether the same request may succeed elsewhere or later."""

from __future__ import annotations


class HsmError(Exception):
    """Base of all. The message is for an operator: never key material, a PIN or the bytes to be signed."""

    retryable = False


class SignerUnavailable(HsmError):
    """No worker that could sign with this key is up."""

    retryable = True


class DeadlineExceeded(HsmError):
    """The signature did not arrive before the request's deadline."""


class Overloaded(HsmError):
    """The pool's queue is full, or the predicted wait exceeds the deadline: refused at once."""


class KeyNotFound(HsmError):
    """The token has no key under this label."""


class PolicyRejected(HsmError):
    """The worker's policy refuses to sign these bytes with this key. `rule` names the rule broken."""

    def __init__(self, rule: str) -> None:
        super().__init__(f"refused by the key's policy: {rule}")
        self.rule = rule


class TokenError(HsmError):
    """The token failed. `code` is its own word for it: `CKR_DEVICE_ERROR`, `ThrottlingException`, ..."""

    def __init__(self, code: str, message: str = "", *, retryable: bool = False) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code
        self.retryable = retryable


class PinRefused(HsmError):
    """The token refused the PIN. Never retried on its own: repeated tries lock a real token."""


class TokenFileError(HsmError):
    """A soft token's file is missing, damaged or of another format. The message names the file and the place."""


class TokenConfigError(HsmError):
    """What the configuration says of a token cannot be: no PIN file, no such module. The message names the place."""


class WorkerFailed(HsmError):
    """A token's worker does not come up. The message is the worker's own."""
