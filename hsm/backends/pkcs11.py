"""A token behind a PKCS#11 module: an HSM, a TPM, SoftHSM2.

The backend opens `sessions` PKCS#11 sessions, one for each Signer, for a session signs one thing at a time (PKCS#11
v2.40 base specification, section 5.11). A Signer outlives what tokens do to it: sessions that end, logins that are
forgotten, keys that move to other handles, a token that goes away for a while.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from pkcs11 import PKCS11Error, Session
from typing_extensions import assert_never

from hsm import metrics
from hsm.backends.base import Backend, Signer
from hsm.backends.opening import step
from hsm.backends.pkcs11_errors import CKR_SESSION_COUNT, CryptokiError, Remedy
from hsm.backends.pkcs11_keys import TokenKey, find_keys, generate_key
from hsm.backends.pkcs11_library import Library, close_session, handle_of, mechanisms, open_session
from hsm.backends.pkcs11_mechanisms import Recipe, recipes_for
from hsm.backends.pkcs11_token import OpenToken, TokenKeeper, TokenSelector
from hsm.errors import KeyNotFound, TokenConfigError, TokenError
from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyInfo, KeyType, SignatureScheme
from hsm.metricstore import MetricStore

_SIGN_ATTEMPTS = 5
_PAUSE_S = 0.002
_CHECK = b"tlsproxy: does this token sign with this key?"

_log = logging.getLogger(__name__)


class Pkcs11Signer(Signer):
    """One PKCS#11 session."""

    def __init__(self, backend: Pkcs11Backend) -> None:
        """Open the session. Raises CryptokiError."""
        self._backend = backend
        self._token = backend.token
        self._sign = backend.module.sign
        self._session: Session | None = None
        self._open_session(self._token.state)
        self._confirmed: OpenToken | None = None

    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        """See Signer.sign."""
        return self.sign_by(self._backend.recipes[key, scheme], self._backend.keys[key], tbs)

    def sign_by(self, recipe: Recipe, key: KeyInfo | TokenKey, tbs: bytes) -> bytes:
        """Sign, and do what the token's errors call for before trying again. Raises as `sign` does."""
        data = recipe.token_input(tbs)
        has_lost_session = False
        for attempt in range(_SIGN_ATTEMPTS):
            state = self._token.state
            handle = state.handles.get(key.public_key)
            if handle is None:
                raise KeyNotFound(f"the token no longer has the key that was {key.label!r}")
            try:
                if self._session is None:
                    self._open_session(state)
                    self._backend.count_session_opened_again()
                raw = self._sign(self._handle, recipe.mechanism, recipe.parameter, handle, data)
            except CryptokiError as error:
                last = error
                has_lost_session = has_lost_session or error.session_is_gone
                self._remedy(error, state, attempt, has_lost_session=has_lost_session)
                continue
            if state is not self._confirmed:
                self._token.confirm(state)
                self._confirmed = state
            return raw if recipe.curve_bytes is None else _ecdsa_der(raw, recipe.curve_bytes)
        raise last.token_error()

    def _remedy(self, error: CryptokiError, state: OpenToken, attempt: int, *, has_lost_session: bool) -> None:
        """Do what may help. Raises TokenError when nothing does, and PinRefused.

        `has_lost_session`: with this signature the token has said that ours is gone, so all others may be.
        """
        match error.remedy:
            case Remedy.NEW_SESSION:
                self._drop_session(is_gone=error.session_is_gone)
            case Remedy.NEW_LOGIN:
                self._token.recover(state, error, sessions_are_gone=has_lost_session)
            case Remedy.NEW_TOKEN:
                self._drop_session(is_gone=False)
                self._token.recover(state, error, sessions_are_gone=False)
            case Remedy.WAIT:
                time.sleep(_PAUSE_S * 2**attempt)
            case Remedy.NONE:
                raise error.token_error(retryable=False)
            case _:
                assert_never(error.remedy)

    def _open_session(self, state: OpenToken) -> None:
        self._session = open_session(state.token)
        self._handle = handle_of(self._session)

    def _drop_session(self, *, is_gone: bool) -> None:
        """Close the session, should it still be there: a token has only so many."""
        if self._session is not None:
            if not is_gone:
                with contextlib.suppress(CryptokiError):
                    close_session(self._session)
            self._session = None
            self._backend.count_session_lost()


class Pkcs11Backend(Backend):
    """A token opened with so many sessions. To be made before any thread starts."""

    def __init__(
        self,
        module_path: str,
        selector: TokenSelector,
        pin: bytearray,
        *,
        sessions: int,
        key_references: Sequence[str] = (),
        name: str,
        store: MetricStore,
    ) -> None:
        """Load the module, log in, find the keys, open the sessions, and make one signature with each key.

        `key_references` are labels or pkcs11: URIs; the worker signs with no other key. Given none, it does with all.

        Raises:
            TokenConfigError: no such module, token or mechanism, or fewer sessions than asked for.
            KeyNotFound: the token has no key that can serve TLS.
            PinRefused: the token refuses the PIN.
            TokenError: the token does not work.
        """
        self._key_references = key_references
        self._store = store
        self._sessions_slot = store.gauge(metrics.SESSIONS, (name, "open"))
        self._reopens_slot = store.counter(metrics.SESSION_REOPENS, (name,))
        self._store_lock = threading.Lock()
        self.module = _load(module_path)
        try:
            self.token = TokenKeeper(self.module, selector, bytearray(pin), key_references)
            self._signers = self._open_sessions(sessions)
            self._keys, self.recipes = self._usable_keys()
        except BaseException:
            self.close()
            raise
        store.values[self._sessions_slot] = len(self._signers)

    @property
    def keys(self) -> tuple[KeyInfo, ...]:
        """The keys found at the start. A key that comes to the token later is announced by the next worker."""
        return self._keys

    @property
    def signers(self) -> Sequence[Pkcs11Signer]:
        """One for each session."""
        return self._signers

    @property
    def is_lost(self) -> bool:
        """See Backend.is_lost."""
        return self.token.is_lost

    def close(self) -> None:
        """End the login and all sessions. No signer may be at work."""
        with contextlib.suppress(CryptokiError):
            self.module.finalize()

    def count_session_lost(self) -> None:
        """Count a session that is of no more use. Called by signers, in their threads."""
        with self._store_lock:
            self._store.values[self._sessions_slot] -= 1.0

    def count_session_opened_again(self) -> None:
        """Count a session opened in place of a lost one. Called by signers, in their threads."""
        with self._store_lock:
            self._store.values[self._sessions_slot] += 1.0
            self._store.values[self._reopens_slot] += 1.0

    def _open_sessions(self, count: int) -> tuple[Pkcs11Signer, ...]:
        signers: list[Pkcs11Signer] = []
        try:
            while len(signers) < count:
                signers.append(Pkcs11Signer(self))
        except CryptokiError as error:
            if error.value != CKR_SESSION_COUNT:
                raise error.token_error() from None
            raise TokenConfigError(
                f"expected {count} sessions, and one for the login; the token allows {len(signers) + 1} in all"
            ) from None
        return tuple(signers)

    def _usable_keys(self) -> tuple[tuple[KeyInfo, ...], dict[tuple[int, SignatureScheme], Recipe]]:
        """Return the keys that have signed once, numbered, and how each of their schemes is made."""
        try:
            flags = mechanisms(self.token.state.token.slot)
        except CryptokiError as error:
            raise error.token_error() from None
        infos: list[KeyInfo] = []
        recipes: dict[tuple[int, SignatureScheme], Recipe] = {}
        problems = []
        for key in self.token.state.keys:
            try:
                working = self._working_recipes(key, recipes_for(key.key_type, flags))
            except (TokenConfigError, TokenError) as error:
                problems.append(f"key {key.label!r}: {error}")
                continue
            if key.key_type.is_rsa and SignatureScheme.RSA_PSS_RSAE_SHA256 not in working:
                _log.warning("key %r: the token does not sign by RSA-PSS, so the key cannot serve TLS 1.3", key.label)
            number = len(infos)
            infos.append(KeyInfo(number, key.label, key.key_type, key.public_key, key.id, tuple(working)))
            recipes.update({(number, scheme): recipe for scheme, recipe in working.items()})
        if not infos:
            wanted = f"one of {', '.join(self._key_references)}" if self._key_references else "a key that can serve TLS"
            raise KeyNotFound("; ".join(problems) or f"expected {wanted}; the token has none")
        for problem in problems:
            _log.error("%s", problem)
        return tuple(infos), recipes

    def _working_recipes(
        self, key: TokenKey, recipes: Mapping[SignatureScheme, Recipe]
    ) -> dict[SignatureScheme, Recipe]:
        """Return those that make a valid signature. Raises TokenError when none does."""
        public_key = load_public_key(key.public_key)
        working = {}
        problem = TokenError("SIGNATURE_INVALID", "what the token shows as the public key is another key's")
        for scheme, recipe in recipes.items():
            step("C_Sign")
            try:
                signature = self._signers[0].sign_by(recipe, key, _CHECK)
            except TokenError as error:
                _log.warning("key %r: scheme %s: %s", key.label, scheme.label, error)
                problem = error
                continue
            if is_signature_valid(public_key, scheme, _CHECK, signature):
                working[scheme] = recipe
        if not working:
            raise problem
        return working


def _ecdsa_der(raw: bytes, curve_bytes: int) -> bytes:
    """Turn r || s (PKCS#11 mechanisms v2.40 section 2.3.1) into the SEQUENCE that TLS wants (RFC 8422 section 5.4)."""
    if len(raw) != 2 * curve_bytes:
        raise TokenError("SIGNATURE_INVALID", f"expected {2 * curve_bytes} bytes of the token; got {len(raw)}")
    return encode_dss_signature(int.from_bytes(raw[:curve_bytes], "big"), int.from_bytes(raw[curve_bytes:], "big"))


def _load(path: str) -> Library:
    try:
        return Library(path)
    except (OSError, PKCS11Error) as error:
        raise TokenConfigError(f"{path}: expected a PKCS#11 module that works; {error}") from None


def generate_key_on_token(
    module_path: str, selector: TokenSelector, pin: bytearray, label: str, key_type: KeyType
) -> TokenKey:
    """Make a key pair on a token, and return what the token then shows of it.

    Raises TokenConfigError, PinRefused and TokenError as Pkcs11Backend does; ValueError if the label is in use.
    """
    library = _load(module_path)
    try:
        before = TokenKeeper(library, selector, pin, ()).state
        if any(key.label == label for key in before.keys):
            raise ValueError(f"expected a label that is not in use on the token; got {label!r}")
        try:
            generate_key(before.session, label, key_type)
            (key,) = find_keys(before.session, [f"pkcs11:object={quote(label, safe='')}"])
        except CryptokiError as error:
            raise error.token_error(retryable=False) from None
        return key
    finally:
        library.finalize()
