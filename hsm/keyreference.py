"""How a configuration names a key: by its label, or by a PKCS#11 URI (RFC 7512)."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from hsm.messages import KeyInfo

_SCHEME = "pkcs11:"


@dataclass(frozen=True, slots=True)
class KeyReference:
    """The key sought: by CKA_LABEL, by CKA_ID, or by both."""

    label: str | None = None
    id: bytes | None = None

    @classmethod
    def parse(cls, text: str) -> KeyReference:
        """Return what `text` refers to: `www-2026`, or `pkcs11:object=www-2026;id=%01`.

        Of the path attributes of RFC 7512 (section 2.3) `object`, `id` and `type=private` name a key; which token it is
        on is configured elsewhere, and so is the PIN. Raises ValueError.
        """
        if not text.startswith(_SCHEME):
            if not text:
                raise ValueError("expected a key's label or a pkcs11: URI; got an empty string")
            return cls(label=text)
        if "?" in text:
            raise ValueError("expected no query in a pkcs11: URI (the PIN comes from pin_file or pin_env); got one")
        label: str | None = None
        id_: bytes | None = None
        for attribute in text[len(_SCHEME) :].split(";"):
            name, _, value = attribute.partition("=")
            if name == "object" and label is None and value:
                label = _unquote(value).decode()
            elif name == "id" and id_ is None and value:
                id_ = _unquote(value)
            elif attribute != "type=private":
                raise ValueError(
                    f"expected object=, id= or type=private, once each, in a pkcs11: URI; got {attribute!r}"
                )
        if label is None and id_ is None:
            raise ValueError("expected object= or id= in a pkcs11: URI; got neither")
        return cls(label, id_)

    def matches(self, key: KeyInfo) -> bool:
        """Tell whether this names `key`."""
        return self.label in (None, key.label) and self.id in (None, key.id)


def _unquote(value: str) -> bytes:
    """Decode percent-encoding, strictly."""
    decoded = unquote_to_bytes(value)
    if len(decoded) != len(value.encode()) - 2 * value.count("%"):
        raise ValueError(f"expected two hexadecimal digits after each %; got {value!r}")
    return decoded
