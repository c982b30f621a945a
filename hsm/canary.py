"""A request whose answer can be judged: is a token that failed fit to sign for clients again?"""

from __future__ import annotations

import os

from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyInfo, KeyType, SignatureScheme

_CONTENT_START = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00"
_SCHEMES = {
    KeyType.ECDSA_P256: SignatureScheme.ECDSA_SECP256R1_SHA256,
    KeyType.ECDSA_P384: SignatureScheme.ECDSA_SECP384R1_SHA384,
}


class Canary:
    """Content that the policy of TLS server keys lets pass, and that no TLS client will ever accept.

    It is what a server signs in TLS 1.3 (RFC 8446 section 4.4.3), over 32 random bytes instead of a transcript hash.
    """

    def __init__(self, key: KeyInfo) -> None:
        self.key = key
        self.scheme = _SCHEMES.get(key.key_type, SignatureScheme.RSA_PSS_RSAE_SHA256)
        self.tbs = _CONTENT_START + os.urandom(32)

    def is_answered_by(self, signature: bytes) -> bool:
        """Tell whether `signature` was made with the key, over just this content."""
        try:
            public_key = load_public_key(self.key.public_key)
        except ValueError:
            return False
        return is_signature_valid(public_key, self.scheme, self.tbs, signature)
