"""python-pkcs11, made fit for a worker.

It finds tokens, keys and mechanisms, opens PKCS#11 sessions and makes keys. Five calls are made past it (_cryptoki):
C_Initialize, for it asks for no locking, and C_Finalize, which it will then not call; C_Login, for it forgets to close
the session of a login that fails and wants the PIN as an immutable str; C_SignInit and C_Sign, for it asks for the
signature's length first and hands the GIL over three times.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, cast

from pkcs11 import (
    Attribute,
    AttributeSensitive,
    AttributeTypeInvalid,
    MechanismInvalid,
    Object,
    ObjectClass,
    PKCS11Error,
    Session,
    Slot,
    Token,
)
from pkcs11._pkcs11 import SearchIter, lib  # type: ignore[attr-defined]
from pkcs11.attributes import AttributeMapper

from hsm.backends._cryptoki import Module
from hsm.backends.opening import step
from hsm.backends.pkcs11_errors import CryptokiError


class _RawAttributes(AttributeMapper):
    """Values as the token has them: those a token may get wrong are not to fail where nobody expects it."""

    def pack_attribute(self, key: Attribute, value: Any) -> bytes:
        return value if isinstance(value, bytes) else super().pack_attribute(key, value)

    def unpack_attributes(self, key: Attribute, value: bytes) -> Any:
        # The library itself looks at the class.
        return super().unpack_attributes(key, value) if key is Attribute.CLASS else value


_RAW = _RawAttributes()
_FIND_BATCH = 64


class _Search(SearchIter):  # type: ignore[misc]
    """What Session.get_objects uses, which prints a traceback when freed after a C_FindObjectsInit that failed."""

    def _finalize(self, silent: bool = False) -> None:
        with contextlib.suppress(PKCS11Error):
            super()._finalize(silent)


@contextlib.contextmanager
def calling(function: str) -> Iterator[None]:
    """Raise CryptokiError, which names this function, for what python-pkcs11 raises."""
    step(function)
    try:
        yield
    except CryptokiError:
        raise
    except PKCS11Error as error:
        raise CryptokiError.of(function, error) from None


class Library(lib):
    """A PKCS#11 module that any thread may call. Its methods may raise CryptokiError."""

    def __init__(self, path: str) -> None:
        """Load it for good and initialise it. Raises OSError with the loader's own words."""
        step("loading the module")
        self._module = Module(path)
        self.sign = self._module.sign
        with calling("C_GetInfo"):
            super().__init__(path)

    def initialize(self) -> None:
        """See Module.initialize. Called by __init__, too."""
        step("C_Initialize")
        self._module.initialize()

    def finalize(self) -> None:
        """See Module.finalize."""
        self._module.finalize()

    def log_in(self, session: Session, pin: bytearray) -> None:
        """See Module.login."""
        step("C_Login")
        self._module.login(handle_of(session), pin)

    def slots(self) -> list[Slot]:
        """Return the slots that have a token, as they are now."""
        with calling("C_GetSlotList"):
            return self.get_slots(token_present=True)


def handle_of(thing: Session | Object) -> int:
    """Return the PKCS#11 handle of a session or object."""
    handle: int = cast("Any", thing).handle  # missing in the library's types
    return handle


def mechanisms(slot: Slot) -> dict[int, int]:
    """Return the CKF_* flags of each mechanism a slot's token has."""
    flags = {}
    with calling("C_GetMechanismInfo"):
        for mechanism in slot.get_mechanisms():
            # The library's list may have something else at its end: it takes the first count a token says for the last.
            with contextlib.suppress(MechanismInvalid):
                flags[int(mechanism)] = int(slot.get_mechanism_info(mechanism).flags)
    return flags


def open_session(token: Token) -> Session:
    """Open a read/write session: AWS CloudHSM's library (Client SDK 5) knows no other kind."""
    with calling("C_OpenSession"):
        return token.open(rw=True, attribute_mapper=_RAW)


def close_session(session: Session) -> None:
    """Close it."""
    with calling("C_CloseSession"):
        session.close()


def find_objects(
    session: Session, class_: ObjectClass, template: Mapping[Attribute, bytes], limit: int
) -> list[Object]:
    """Return at most `limit` objects of this class that have these attributes."""
    with calling("C_FindObjects"), _Search(session, {Attribute.CLASS: class_, **template}, _FIND_BATCH) as batches:
        return list(itertools.islice(itertools.chain.from_iterable(batches), limit))


def attribute(object_: Object, type_: Attribute) -> bytes | None:
    """Return one attribute as it is, or None when the object has none such or does not show it."""
    with calling("C_GetAttributeValue"):
        try:
            value: bytes = object_[type_]
        except (AttributeTypeInvalid, AttributeSensitive):
            return None
        return value
