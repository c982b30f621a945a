"""A PKCS#11 token: found, logged in to, its keys found; and all of that again when the token has forgotten it.

Threads share one TokenKeeper. What one of them has won back the others use: each names the OpenToken it saw fail, and
only the first of them does the work.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pkcs11 import PKCS11Error, Session, Token, TokenFlag

from hsm.backends.pkcs11_errors import (
    CKR_CRYPTOKI_NOT_INITIALIZED,
    CKR_USER_ALREADY_LOGGED_IN,
    PIN_REFUSED,
    CryptokiError,
)
from hsm.backends.pkcs11_keys import TokenKey, find_keys
from hsm.backends.pkcs11_library import Library, close_session, open_session
from hsm.errors import PinRefused, TokenConfigError, TokenError

_OPEN_ATTEMPTS = 3
_BACK_OFF_S = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
_LOST_AFTER_S = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenSelector:
    """Which of a module's tokens is meant; what is None does not matter."""

    label: str | None = None
    serial: str | None = None
    slot: int | None = None

    def __str__(self) -> str:
        named = {"label": self.label, "serial number": self.serial, "slot": self.slot}
        return " and ".join(f"{name} {value!r}" for name, value in named.items() if value is not None)

    def matches(self, token: Token) -> bool:
        """Whether it is this one."""
        return (
            self.label in (None, token.label)
            and self.serial in (None, _serial(token))
            and self.slot in (None, token.slot.slot_id)
        )


@dataclass(frozen=True, slots=True)
class OpenToken:
    """A token at one time: all of this is void once it has forgotten the login."""

    generation: int
    """Goes up with each login."""
    token: Token
    session: Session
    """Keeps the login alive: the application is logged out when its last session closes (PKCS#11 v2.40 section 2.6)."""
    keys: tuple[TokenKey, ...]
    handles: Mapping[bytes, int]
    """The private keys' handles, good in all sessions, by the public key: its label may come to mean another key."""


class TokenKeeper:
    """A token that has been found and logged in to."""

    def __init__(
        self, library: Library, selector: TokenSelector, pin: bytearray, key_references: Sequence[str]
    ) -> None:
        """Find the token and its keys. The PIN stays in memory, for the token may want it again.

        Raises:
            TokenConfigError: more than one token is what `selector` says, or the token's PIN is about to be locked.
            PinRefused: the token refuses the PIN.
            TokenError: the token is not there, or does not work.
        """
        self._library = library
        self._selector = selector
        self._pin = pin
        self._key_references = key_references
        self._lock = threading.Lock()
        self._refusal: str | None = None
        self._failures = 0
        self._failing_since_s = 0.0
        self._not_before_s = 0.0
        self.state = self._reopened(0)
        """The token as it is now. Replaced as a whole, so that a thread may take it without a lock."""

    @property
    def is_lost(self) -> bool:
        """The token has failed for so long that the module may have to be loaded anew, by a new process."""
        return self._failures > 0 and time.monotonic() - self._failing_since_s > _LOST_AFTER_S

    def recover(self, failed: OpenToken, cause: CryptokiError, *, sessions_are_gone: bool) -> None:
        """Find the token, log in and find the keys again, unless another thread has since `failed` was taken.

        A token that stays away, or fails again before it has signed, is tried less and less often, every 0.8 s at last;
        in between this fails at once. The session that kept the login is closed, unless `sessions_are_gone`.

        Raises TokenError, retryable, and PinRefused: from then on at once, without another try.
        """
        with self._lock:
            if self._refusal is not None:
                raise PinRefused(self._refusal)
            if self.state is not failed:
                return
            now_s = time.monotonic()
            if now_s < self._not_before_s:
                raise cause.token_error()
            if self._failures == 0:
                self._failing_since_s = now_s
                _log.warning("%s; opening the token again", cause)
            self._not_before_s = now_s + _BACK_OFF_S[min(self._failures, len(_BACK_OFF_S) - 1)]
            self._failures += 1
            if not sessions_are_gone:
                with contextlib.suppress(CryptokiError):
                    close_session(failed.session)
            try:
                self.state = self._reopened(failed.generation + 1)
            except TokenConfigError as error:
                raise TokenError(cause.code, str(error), retryable=True) from None

    def confirm(self, state: OpenToken) -> None:
        """Tell that a signature was made since the token was opened as `state`: it works again."""
        with self._lock:
            if self._failures and state is self.state:
                _log.info("the token works again, after %d tries", self._failures)
                self._failures = 0
                self._not_before_s = 0.0

    def _reopened(self, generation: int, attempts: int = _OPEN_ATTEMPTS) -> OpenToken:
        """Open it, some times over, for what was won back may be lost again before all is done. Raises TokenError."""
        try:
            return self._open(generation)
        except CryptokiError as error:
            if attempts == 1:
                raise error.token_error() from None
            # python-pkcs11 has no exception of its own for CKR_CRYPTOKI_NOT_INITIALIZED.
            if error.value in (None, CKR_CRYPTOKI_NOT_INITIALIZED):
                with contextlib.suppress(CryptokiError):  # the next attempt will tell
                    self._library.initialize()
        return self._reopened(generation, attempts - 1)

    def _open(self, generation: int) -> OpenToken:
        token = self._find_token()
        session = open_session(token)
        try:
            self._log_in(session)
            keys = tuple(find_keys(session, self._key_references))
        except Exception:
            with contextlib.suppress(CryptokiError):
                close_session(session)
            raise
        return OpenToken(generation, token, session, keys, {key.public_key: key.handle for key in keys})

    def _find_token(self) -> Token:
        """Return the token in the slot it is in now: one that was away may come back in another.

        Raises TokenError while it is away, TokenConfigError when only a person can help, and CryptokiError.
        """
        matching = []
        seen = []
        for slot in self._library.slots():
            try:
                token = slot.get_token()
            except PKCS11Error:
                seen.append(f"slot {slot.slot_id}: no token that answers")
                continue
            seen.append(f"slot {slot.slot_id}: label {token.label!r}, serial number {_serial(token)!r}")
            if self._selector.matches(token):
                matching.append(token)
        problem = f"expected one token with {self._selector}; got {len(matching)} ({'; '.join(seen) or 'no slots'})"
        if not matching:
            raise TokenError("CKR_TOKEN_NOT_PRESENT", problem, retryable=True)
        if len(matching) > 1:
            raise TokenConfigError(problem)
        (token,) = matching
        if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
            raise TokenConfigError(
                f"token with {self._selector}: another refused PIN locks it (CKF_USER_PIN_FINAL_TRY), so none is tried;"
                " log in by hand once"
            )
        return token

    def _log_in(self, session: Session) -> None:
        try:
            self._library.log_in(session, self._pin)
        except CryptokiError as error:
            if error.value == CKR_USER_ALREADY_LOGGED_IN:
                return
            if error.value in PIN_REFUSED:
                self._refusal = f"token with {self._selector}: the PIN was refused: {error.code}"
                raise PinRefused(self._refusal) from None
            raise


def _serial(token: Token) -> str:
    return token.serial.rstrip(b" \0").decode("utf-8", "replace")
