"""A request whose answer can be judged: is a token that failed fit to sign for clients again?"""

from __future__ import annotations

import os

from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyInfo

_NAMED_CURVE_X25519 = b"\x03\x00\x1d\x20"


class Canary:
    """Content that the policy of TLS server keys lets pass with every scheme, and that no client will ever accept.

    It has the shape of what a server signs in TLS 1.2 (RFC 8422 section 5.4), with randoms that no client chose and a
    share to which nobody has the private key.
    """

    def __init__(self, key: KeyInfo) -> None:
        self._key = key
        self.scheme = key.schemes[0]
        self.tbs = os.urandom(64) + _NAMED_CURVE_X25519 + os.urandom(32)

    def is_answered_by(self, signature: bytes) -> bool:
        """Tell whether `signature` was made with the key, over just this content."""
        try:
            public_key = load_public_key(self._key.public_key)
        except ValueError:
            return False
        return is_signature_valid(public_key, self.scheme, self.tbs, signature)
