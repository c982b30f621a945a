"""Records written by hand, with a client's own secrets: what Python's ssl refuses to send (RFC 8446, RFC 5246)."""

from __future__ import annotations

import hmac
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

HANDSHAKE, APPLICATION_DATA, ALERT = 22, 23, 21
KEY_UPDATE = bytes([24, 0, 0, 1, 1])
"""update_requested: the receiver must answer with one of its own."""


def expand_label(secret: bytes, label: str, length: int) -> bytes:
    """HKDF-Expand-Label with an empty context, section 7.1."""
    full_label = b"tls13 " + label.encode()
    info = length.to_bytes(2, "big") + bytes([len(full_label)]) + full_label + b"\x00"
    return HKDFExpand(hashes.SHA256(), length, info).derive(secret)


class RecordWriter:
    """Encrypts records under TLS_AES_128_GCM_SHA256 as the client of a finished handshake would."""

    def __init__(self, key_log: Path) -> None:
        secrets = dict(line.split()[::2] for line in key_log.read_text().splitlines() if not line.startswith("#"))
        self._use(bytes.fromhex(secrets["CLIENT_TRAFFIC_SECRET_0"]))

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._cipher = AESGCM(expand_label(secret, "key", 16))
        self._iv = int.from_bytes(expand_label(secret, "iv", 12), "big")
        self._sequence = 0

    def record(self, content_type: int, content: bytes) -> bytes:
        header = bytes([APPLICATION_DATA, 3, 3]) + (len(content) + 17).to_bytes(2, "big")
        nonce = (self._iv ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return header + self._cipher.encrypt(nonce, content + bytes([content_type]), header)

    def key_update(self) -> bytes:
        """A KeyUpdate; the records after it are under the next key (section 7.2)."""
        record = self.record(HANDSHAKE, KEY_UPDATE)
        self._use(expand_label(self._secret, "traffic upd", 32))
        return record


class Tls12RecordWriter:
    """The same for TLS 1.2 and a suite with AES-128-GCM and SHA-256 (RFC 5288); Finished was its first record."""

    def __init__(self, key_log: Path, server_random: bytes) -> None:
        label, client_random, master_secret = key_log.read_text().splitlines()[-1].split()
        assert label == "CLIENT_RANDOM"
        seed = b"key expansion" + server_random + bytes.fromhex(client_random)
        secret, chained, key_block = bytes.fromhex(master_secret), seed, b""
        while len(key_block) < 40:  # P_SHA256, RFC 5246 section 5
            chained = hmac.digest(secret, chained, "sha256")
            key_block += hmac.digest(secret, chained + seed, "sha256")
        self._cipher = AESGCM(key_block[:16])
        self._salt = key_block[32:36]
        self._sequence = 1

    def record(self, content_type: int, content: bytes) -> bytes:
        sequence = self._sequence.to_bytes(8, "big")
        self._sequence += 1
        additional = sequence + bytes([content_type, 3, 3]) + len(content).to_bytes(2, "big")
        body = sequence + self._cipher.encrypt(self._salt + sequence, content, additional)
        return bytes([content_type, 3, 3]) + len(body).to_bytes(2, "big") + body


def without_key_shares(client_hello: bytes) -> bytes:
    """The same ClientHello record with an empty key_share extension: a wish for a HelloRetryRequest (section 4.2.8)."""
    at = 5 + 4 + 2 + 32
    at += 1 + client_hello[at]  # session id
    at += 2 + int.from_bytes(client_hello[at : at + 2], "big")  # cipher suites
    at += 1 + client_hello[at]  # compression methods
    before, extensions, position = client_hello[9:at], b"", at + 2
    while position < len(client_hello):
        end = position + 4 + int.from_bytes(client_hello[position + 2 : position + 4], "big")
        is_key_share = client_hello[position : position + 2] == b"\x00\x33"
        extensions += b"\x00\x33\x00\x02\x00\x00" if is_key_share else client_hello[position:end]
        position = end
    body = before + len(extensions).to_bytes(2, "big") + extensions
    message = b"\x01" + len(body).to_bytes(3, "big") + body
    return client_hello[:3] + len(message).to_bytes(2, "big") + message
