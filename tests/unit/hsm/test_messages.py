from __future__ import annotations

import contextlib
import json
import random
import struct
from dataclasses import replace
from typing import Any

import pytest

from hsm.messages import (
    HELLO_HEADER,
    MAX_HELLO_BYTES,
    MAX_SIGNATURE_BYTES,
    MAX_TBS_BYTES,
    REPLY_HEADER,
    REQUEST_HEADER,
    Hello,
    KeyInfo,
    KeyType,
    ProtocolError,
    SignatureScheme,
    SignReply,
    SignRequest,
    Status,
    decode_hello,
    decode_replies,
    decode_requests,
    encode_hello,
    encode_reply,
    encode_request,
)

REQUESTS = [
    SignRequest(0, 0, 0x0403, 1, b""),
    SignRequest(1, 2, 0x0804, 3, b"tbs"),
    SignRequest(2**32 - 1, 2**32 - 1, 0xFFFF, 2**64 - 1, b"x" * MAX_TBS_BYTES),
]
REPLIES = [
    SignReply(0, Status.OK, b"signature", 1, 2),
    SignReply(2**32 - 1, Status.POLICY, b"x" * MAX_SIGNATURE_BYTES, 2**32 - 1, 2**32 - 1),
    SignReply(7, Status.EXPIRED, b"", 0, 0),
]
HELLO = Hello(
    "local",
    4711,
    128,
    (
        KeyInfo(0, "www", KeyType.ECDSA_P256, b"\x00\xff", b"\x01"),
        KeyInfo(1, "ü", KeyType.RSA_2048, b"der", schemes=(SignatureScheme.RSA_PKCS1_SHA256,)),
    ),
)


def test_the_frames_are_laid_out_as_documented() -> None:
    assert encode_request(SignRequest(1, 2, 0x0403, 5, b"tbs")) == struct.pack("<IHHIQ", 1, 3, 0x0403, 2, 5) + b"tbs"
    assert encode_reply(SignReply(1, Status.POLICY, b"no", 6, 7)) == struct.pack("<IHBxII", 1, 2, 3, 6, 7) + b"no"


def test_requests_survive_any_cut() -> None:
    stream = b"".join(map(encode_request, REQUESTS))
    for cut in range(len(stream) + 1):
        first, used = decode_requests(stream[:cut])
        second, rest = decode_requests(stream[used:])
        assert first + second == REQUESTS
        assert used + rest == len(stream)


def test_replies_survive_any_cut() -> None:
    stream = b"".join(map(encode_reply, REPLIES))
    for cut in range(len(stream) + 1):
        first, used = decode_replies(stream[:cut])
        second, rest = decode_replies(bytearray(stream[used:]))
        assert first + second == REPLIES
        assert used + rest == len(stream)


def test_a_hello_is_taken_whole_and_nothing_after_it() -> None:
    frame = encode_hello(HELLO)
    assert all(decode_hello(frame[:cut]) is None for cut in range(len(frame)))
    assert decode_hello(frame + b"more") == (HELLO, len(frame))


def test_a_key_signs_with_all_its_type_can_unless_told() -> None:
    assert HELLO.keys[0].schemes == KeyType.ECDSA_P256.schemes
    assert SignatureScheme.ECDSA_SECP256R1_SHA256 in KeyType.ECDSA_P256.schemes
    assert SignatureScheme.RSA_PSS_RSAE_SHA256 not in KeyType.ECDSA_P256.schemes


@pytest.mark.parametrize(
    ("scheme", "label", "hash_name"),
    [
        (SignatureScheme.ECDSA_SECP384R1_SHA384, "ecdsa_secp384r1_sha384", "sha384"),
        (SignatureScheme.RSA_PSS_RSAE_SHA512, "rsa_pss_rsae_sha512", "sha512"),
    ],
)
def test_schemes_have_their_iana_names(scheme: SignatureScheme, label: str, hash_name: str) -> None:
    assert (scheme.label, scheme.hash_name) == (label, hash_name)


def test_refuses_overlong_frames_before_they_arrive() -> None:
    with pytest.raises(ProtocolError, match="tbs of 1025 bytes"):
        decode_requests(REQUEST_HEADER.pack(1, MAX_TBS_BYTES + 1, 0x0403, 0, 0))
    with pytest.raises(ProtocolError, match="payload of 1025 bytes"):
        decode_replies(REPLY_HEADER.pack(1, MAX_SIGNATURE_BYTES + 1, 0, 0, 0))
    with pytest.raises(ProtocolError, match="hello of 1048577 bytes"):
        decode_hello(HELLO_HEADER.pack(MAX_HELLO_BYTES + 1))


def test_refuses_an_unknown_status() -> None:
    with pytest.raises(ProtocolError, match="unknown status 99"):
        decode_replies(REPLY_HEADER.pack(1, 0, 99, 0, 0))


def hello_frame(document: Any) -> bytes:
    body = json.dumps(document).encode()
    return HELLO_HEADER.pack(len(body)) + body


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": 2},
        {"protocol": None},
        {"window": 0},
        {"window": "many"},
        {"pid": []},
        {"keys": 1},
        {"keys": [1]},
        {"keys": [{}]},
    ],
    ids=str,
)
def test_refuses_a_hello_of_another_shape(change: dict[str, Any]) -> None:
    document = json.loads(encode_hello(HELLO)[HELLO_HEADER.size :])
    with pytest.raises(ProtocolError):
        decode_hello(hello_frame(document | change))


@pytest.mark.parametrize(
    "change", [{"key_type": "dsa"}, {"public_key": "?"}, {"id": "xy"}, {"number": None}, {"schemes": [0x0203]}], ids=str
)
def test_refuses_a_key_of_another_shape(change: dict[str, Any]) -> None:
    document = json.loads(encode_hello(HELLO)[HELLO_HEADER.size :])
    document["keys"][0] |= change
    with pytest.raises(ProtocolError):
        decode_hello(hello_frame(document))


@pytest.mark.parametrize("body", [b"", b"[", b"null", b"[" * 5000, b"\xff\xfe"])
def test_refuses_a_hello_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_hello(HELLO_HEADER.pack(len(body)) + body)


def test_no_bytes_raise_anything_but_a_protocol_error() -> None:
    rng = random.Random(1)
    frames = (encode_hello(replace(HELLO, token="t")), encode_request(REQUESTS[1]), encode_reply(REPLIES[0]))
    for _ in range(3000):
        mutated = bytearray(rng.choice(frames))
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        for decode in (decode_hello, decode_requests, decode_replies):
            with contextlib.suppress(ProtocolError):
                decode(mutated)
