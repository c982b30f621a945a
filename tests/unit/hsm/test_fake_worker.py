"""The fake worker is what other tests stand on, so it is tested itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import (
    Hello,
    KeyType,
    SignatureScheme,
    SignReply,
    SignRequest,
    Status,
    decode_hello,
    decode_replies,
    encode_request,
)
from tests.fake_worker import (
    Behaviour,
    FakeWorker,
    answers_bytes,
    delayed,
    dies,
    held_until,
    in_turn,
    never_answers,
    refuses,
    signs,
    signs_with_another_key,
)
from tests.tokens import CERTIFICATE_VERIFY, private_key

SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(tmp_path / "sock", {"www": private_key(KeyType.ECDSA_P256)}) as worker:
        yield worker


async def connect(worker: FakeWorker) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, Hello]:
    reader, writer = await asyncio.open_unix_connection(worker.path)
    decoded = decode_hello(await reader.readexactly(len(worker.hello_bytes)))
    assert decoded is not None
    return reader, writer, decoded[0]


async def ask(worker: FakeWorker, count: int = 1) -> list[SignReply]:
    reader, writer, _ = await connect(worker)
    try:
        for number in range(count):
            writer.write(encode_request(SignRequest(number, 0, SCHEME, 0, CERTIFICATE_VERIFY)))
        data = b""
        replies: list[SignReply] = []
        while len(replies) < count:
            more = await reader.read(65536)
            if not more:
                raise EOFError(data)
            data += more
            replies, _ = decode_replies(data)
        return replies
    finally:
        writer.close()
        await writer.wait_closed()


def is_sound(worker: FakeWorker, reply: SignReply) -> bool:
    key = load_public_key(worker.hello.keys[0].public_key)
    return is_signature_valid(key, SCHEME, CERTIFICATE_VERIFY, reply.payload)


@pytest.mark.parametrize("behaviour", [signs, delayed(0.001)])
async def test_signs_with_the_key_of_its_hello(worker: FakeWorker, behaviour: Behaviour) -> None:
    worker.behaviour = behaviour
    (reply,) = await ask(worker)
    assert reply.status is Status.OK
    assert is_sound(worker, reply)
    assert [request.tbs for request in worker.requests] == [CERTIFICATE_VERIFY]


async def test_the_signature_of_another_key_does_not_verify(worker: FakeWorker) -> None:
    worker.behaviour = signs_with_another_key
    (reply,) = await ask(worker)
    assert reply.status is Status.OK
    assert not is_sound(worker, reply)


async def test_refusals_come_in_turn(worker: FakeWorker) -> None:
    worker.behaviour = in_turn(refuses(Status.BUSY), refuses(Status.RETRY, "CKR_DEVICE_ERROR"), signs)
    replies = sorted(await ask(worker, 4), key=lambda reply: reply.id)
    assert [reply.status for reply in replies] == [Status.BUSY, Status.RETRY, Status.OK, Status.OK]
    assert replies[1].payload == b"CKR_DEVICE_ERROR"


async def test_a_held_request_is_answered_on_release(worker: FakeWorker) -> None:
    release = asyncio.Event()
    worker.behaviour = held_until(release)
    asking = asyncio.ensure_future(ask(worker))
    await worker.received(1)
    assert not asking.done()
    release.set()
    assert is_sound(worker, (await asking)[0])


@pytest.mark.parametrize(("behaviour", "received"), [(dies, b""), (in_turn(answers_bytes(b"?" * 7), dies), b"?" * 7)])
async def test_dies_with_requests_in_hand(worker: FakeWorker, behaviour: Behaviour, received: bytes) -> None:
    worker.behaviour = behaviour
    with pytest.raises(EOFError) as caught:
        await ask(worker, 2)
    assert caught.value.args == (received,)


async def test_stopping_ends_connections_and_starting_again_serves_the_same_path(worker: FakeWorker) -> None:
    worker.behaviour = never_answers
    asking = asyncio.ensure_future(ask(worker))
    await worker.received(1)
    await worker.stop()
    with pytest.raises(EOFError):
        await asking
    worker.behaviour = signs
    await worker.start()
    assert is_sound(worker, (await ask(worker))[0])
