"""What passes between a SignerPool and an HSM worker: signature schemes, key types, frames.

Both ends share one machine, so frames are little-endian and times are CLOCK_MONOTONIC nanoseconds. The transport is a
Unix stream socket; any number of frames stand back to back. After accepting a connection the worker sends one Hello,
then one reply for each request, in any order.
"""

from __future__ import annotations

import base64
import enum
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROTOCOL_VERSION = 1
MAX_TBS_BYTES = 1024
MAX_SIGNATURE_BYTES = 1024
MAX_HELLO_BYTES = 1 << 20
DEFAULT_WINDOW = 128
"""Requests a client may have in flight on one connection: 167 replies fit a default socket buffer."""

REQUEST_HEADER = struct.Struct("<IHHIQ")
"""id u32, tbs_len u16, scheme u16, key number u32, deadline_ns u64; then the tbs."""
REPLY_HEADER = struct.Struct("<IHBxII")
"""id u32, sig_len u16, status u8, pad, queue_us u32, sign_us u32; then the signature, or the reason as ASCII text."""
HELLO_HEADER = struct.Struct("<I")
"""Length u32 of the JSON document that follows."""


class SignatureScheme(enum.IntEnum):
    """TLS SignatureScheme code points (RFC 8446 section 4.2.3) that a token can be asked for."""

    RSA_PKCS1_SHA256 = 0x0401
    RSA_PKCS1_SHA384 = 0x0501
    RSA_PKCS1_SHA512 = 0x0601
    ECDSA_SECP256R1_SHA256 = 0x0403
    ECDSA_SECP384R1_SHA384 = 0x0503
    RSA_PSS_RSAE_SHA256 = 0x0804
    RSA_PSS_RSAE_SHA384 = 0x0805
    RSA_PSS_RSAE_SHA512 = 0x0806

    @property
    def label(self) -> str:
        """The IANA name, as in logs and metric labels: `ecdsa_secp256r1_sha256`."""
        return self.name.lower()

    @property
    def hash_name(self) -> str:
        """`sha256`, `sha384` or `sha512`."""
        return self.label.rsplit("_", 1)[1]


class KeyType(str, enum.Enum):
    """The kinds of key a certificate may have."""

    ECDSA_P256 = "ecdsa-p256"
    ECDSA_P384 = "ecdsa-p384"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"

    @property
    def is_rsa(self) -> bool:
        """True for RSA keys of any size."""
        return self.value.startswith("rsa")

    @property
    def schemes(self) -> tuple[SignatureScheme, ...]:
        """The schemes a key of this type can sign. In TLS 1.2 ECDSA's hash is not tied to the curve (RFC 8422)."""
        return _RSA_SCHEMES if self.is_rsa else _ECDSA_SCHEMES


_RSA_SCHEMES = tuple(s for s in SignatureScheme if s.name.startswith("RSA"))
_ECDSA_SCHEMES = tuple(s for s in SignatureScheme if s.name.startswith("ECDSA"))


class Status(enum.IntEnum):
    """How a worker answered a request. The payload of OK is the signature; of the others, ASCII text."""

    OK = 0
    ERROR = 1
    """The token failed, and another would too. Payload: `CODE: message`, as of a TokenError that is not retryable."""
    EXPIRED = 2
    """The deadline passed before the token was done."""
    POLICY = 3
    """Refused by the key's policy, for good. Payload: the rule broken."""
    BUSY = 4
    """Not taken: the worker has as much in hand as it can hold. Ask again, or elsewhere."""
    NO_KEY = 5
    """The token no longer has this key. Another token may."""
    RETRY = 6
    """The token failed; another may succeed. Payload: `CODE: message`, as of a TokenError that is retryable."""


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key as a worker announces it. `number` is valid on that connection only."""

    number: int
    label: str
    key_type: KeyType
    public_key: bytes
    """SubjectPublicKeyInfo, DER."""
    id: bytes = b""
    """CKA_ID, where the token has one."""
    schemes: tuple[SignatureScheme, ...] = ()
    """What the token can sign with this key; unless told, all that its type can. Some tokens know no RSA-PSS."""

    def __post_init__(self) -> None:
        if not self.schemes:
            object.__setattr__(self, "schemes", self.key_type.schemes)


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker's first frame: it is up, this is its token, these are its keys."""

    token: str
    pid: int
    window: int
    keys: tuple[KeyInfo, ...]


@dataclass(frozen=True, slots=True)
class SignRequest:
    """One signature asked for. `deadline_ns` is on CLOCK_MONOTONIC."""

    id: int
    key: int
    scheme: int
    deadline_ns: int
    tbs: bytes


@dataclass(frozen=True, slots=True)
class SignReply:
    """The answer to the request with the same id; `payload` is the signature (ECDSA as DER) or the reason."""

    id: int
    status: Status
    payload: bytes
    queue_us: int
    sign_us: int


class ProtocolError(ValueError):
    """The peer sent what this protocol does not allow. The connection is of no further use."""


def keys_to_json(keys: Sequence[KeyInfo]) -> list[dict[str, Any]]:
    """Return a key table as JSON values."""
    return [
        {
            "number": key.number,
            "label": key.label,
            "key_type": key.key_type.value,
            "public_key": base64.b64encode(key.public_key).decode(),
            "id": key.id.hex(),
            "schemes": list(key.schemes),
        }
        for key in keys
    ]


def keys_from_json(document: list[dict[str, Any]]) -> tuple[KeyInfo, ...]:
    """Return the key table in what `keys_to_json` made. Raises KeyError, TypeError or ValueError."""
    return tuple(
        KeyInfo(
            number=int(key["number"]),
            label=str(key["label"]),
            key_type=KeyType(key["key_type"]),
            public_key=base64.b64decode(key["public_key"], validate=True),
            id=bytes.fromhex(key["id"]),
            schemes=tuple(SignatureScheme(scheme) for scheme in key["schemes"]),
        )
        for key in document
    )


def encode_hello(hello: Hello) -> bytes:
    """Return the Hello frame."""
    document = {
        "protocol": PROTOCOL_VERSION,
        "token": hello.token,
        "pid": hello.pid,
        "window": hello.window,
        "keys": keys_to_json(hello.keys),
    }
    body = json.dumps(document).encode()
    return HELLO_HEADER.pack(len(body)) + body


def decode_hello(buffer: bytes | bytearray) -> tuple[Hello, int] | None:
    """Take a Hello from the start of `buffer`: (hello, bytes used), or None while it is incomplete.

    Raises ProtocolError.
    """
    if len(buffer) < HELLO_HEADER.size:
        return None
    (length,) = HELLO_HEADER.unpack_from(buffer)
    if length > MAX_HELLO_BYTES:
        raise ProtocolError(f"hello of {length} bytes; at most {MAX_HELLO_BYTES} expected")
    end = HELLO_HEADER.size + length
    if len(buffer) < end:
        return None
    try:
        document = json.loads(bytes(buffer[HELLO_HEADER.size : end]))
        if document["protocol"] != PROTOCOL_VERSION:
            raise ProtocolError(f"worker speaks protocol {document['protocol']!r}; {PROTOCOL_VERSION} expected")
        window = int(document["window"])
        if window < 1:
            raise ProtocolError(f"window of {window}; at least 1 expected")
        keys = keys_from_json(document["keys"])
        return Hello(str(document["token"]), int(document["pid"]), window, keys), end
    except ProtocolError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"malformed hello: {type(error).__name__}") from None


def encode_request(request: SignRequest) -> bytes:
    """Return the request frame."""
    return (
        REQUEST_HEADER.pack(request.id, len(request.tbs), request.scheme, request.key, request.deadline_ns)
        + request.tbs
    )


def decode_requests(buffer: bytes | bytearray) -> tuple[list[SignRequest], int]:
    """Take every whole request from the start of `buffer`: (requests, bytes used). Raises ProtocolError."""
    requests = []
    offset = 0
    header_size = REQUEST_HEADER.size
    while len(buffer) - offset >= header_size:
        id_, tbs_len, scheme, key, deadline_ns = REQUEST_HEADER.unpack_from(buffer, offset)
        if tbs_len > MAX_TBS_BYTES:
            raise ProtocolError(f"tbs of {tbs_len} bytes; at most {MAX_TBS_BYTES} expected")
        end = offset + header_size + tbs_len
        if end > len(buffer):
            break
        requests.append(SignRequest(id_, key, scheme, deadline_ns, bytes(buffer[offset + header_size : end])))
        offset = end
    return requests, offset


def encode_reply(reply: SignReply) -> bytes:
    """Return the reply frame."""
    return REPLY_HEADER.pack(reply.id, len(reply.payload), reply.status, reply.queue_us, reply.sign_us) + reply.payload


def decode_replies(buffer: bytes | bytearray) -> tuple[list[SignReply], int]:
    """Take every whole reply from the start of `buffer`: (replies, bytes used). Raises ProtocolError."""
    replies = []
    offset = 0
    header_size = REPLY_HEADER.size
    while len(buffer) - offset >= header_size:
        id_, length, status, queue_us, sign_us = REPLY_HEADER.unpack_from(buffer, offset)
        if length > MAX_SIGNATURE_BYTES:
            raise ProtocolError(f"payload of {length} bytes; at most {MAX_SIGNATURE_BYTES} expected")
        end = offset + header_size + length
        if end > len(buffer):
            break
        try:
            known_status = Status(status)
        except ValueError:
            raise ProtocolError(f"unknown status {status}") from None
        replies.append(SignReply(id_, known_status, bytes(buffer[offset + header_size : end]), queue_us, sign_us))
        offset = end
    return replies, offset
