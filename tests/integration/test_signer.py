"""A real proxy worker process whose signer is slow, wrong, silent or rude. Established connections must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hsm.messages import KeyType, Status
from hsm.metrics import PENDING
from hsm.pool import TokenEndpoints
from tests.backends import backend
from tests.fake_worker import (
    Behaviour,
    FakeWorker,
    answers_bytes,
    dies,
    held_until,
    in_turn,
    never_answers,
    refuses,
    signs,
    signs_with_another_key,
)
from tests.proxy import make_site, site_config, write_config
from tlsproxy import metrics
from tlsproxy.config_yaml import load_config
from tlsproxy.metrics import merge_stores
from tlsproxy.serve.control import ProxyWorkerSpec
from tlsproxy.serve.materials import load_materials
from tlsproxy.serve.processes import ProxyWorker
from tlsproxy.tls.context import TicketKey

KEYS = {"www": KeyType.ECDSA_P256}
WINDOW = 400


class Site:
    """A proxy worker process and the fake worker that signs for it, or doesn't."""

    def __init__(self, directory: Path, process: ProxyWorker, signer: FakeWorker) -> None:
        self.process = process
        self.signer = signer
        self.context = ssl.create_default_context(cafile=directory / "ca.pem")
        self.port = int(process.listeners[0][0].getsockname()[1])

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context, server_hostname="localhost")

    async def handshake(self) -> None:
        _, writer = await self.connect()
        await close(writer)

    def count(self, family: metrics.Family, **labels: str) -> float:
        """Return the sum over the label sets that have these labels."""
        merged = merge_stores([self.process.metrics_fd], {family.name: family})[family.name]
        return sum(
            values[0]
            for values_of_labels, values in merged.items()
            if labels.items() <= dict(zip(family.label_names, values_of_labels, strict=True)).items()
        )

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until a condition holds; a scenario that never gets there fails with `what`."""
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"never: {what}")

    async def settled(self) -> None:
        """Wait until no connection is left."""
        await self.until(
            lambda: not (self.count(metrics.CONNECTIONS) or self.count(metrics.HANDSHAKES_IN_FLIGHT)),
            "all connections gone",
        )


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Make a request on an established connection, and see that it is answered."""
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    assert await reader.readexactly(5) == b"hello"


@contextlib.asynccontextmanager
async def site(directory: Path, sign_deadline: str = "30s") -> AsyncIterator[Site]:
    token = make_site(directory, KEYS)
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(backend())
        raw = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", log={"level": "error"})
        raw["hsm"]["sign_deadline"] = sign_deadline
        config = load_config(str(write_config(directory, raw)))
        chains = {name: material.pem for name, material in load_materials(config).certificates.items()}
        path = directory / "fake.sock"
        signer = await stack.enter_async_context(FakeWorker(path, token.private_keys, token="local", window=WINDOW))
        keys = (TicketKey.generate(),)
        listening = socket.create_server(("127.0.0.1", 0), backlog=1024)

        def spec(worker: ProxyWorker) -> ProxyWorkerSpec:
            fds = tuple(tuple(listener.fileno() for listener in group) for group in worker.listeners)
            endpoints = (TokenEndpoints("local", (str(path),)),)
            return ProxyWorkerSpec(0, config, chains, {}, fds, endpoints, worker.metrics_fd, (), keys)

        stack.callback(listening.close)
        process = ProxyWorker(0, [[listening]], spec, os.environ, lambda: None, config.hang_timeout_s)
        stack.push_async_callback(process.close, lambda fd: None)
        await process.wait_started()
        yield Site(directory, process, signer)


async def test_signatures_that_do_not_come_hold_up_nobody_else(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        reader, writer = await it.connect()
        signatures_may_come = asyncio.Event()
        it.signer.behaviour = held_until(signatures_may_come)
        storm = [asyncio.create_task(it.handshake()) for _ in range(200)]
        await it.until(lambda: it.count(metrics.HANDSHAKES_IN_FLIGHT) == 200, "200 handshakes that wait")
        await it.until(lambda: len(it.signer.requests) > 100, "as many signatures asked for as the signer takes")
        for _ in range(100):
            await request(reader, writer)
        assert not any(handshake.done() for handshake in storm)
        signatures_may_come.set()
        await asyncio.gather(*storm)
        assert it.count(metrics.HANDSHAKES, result="ok") == 201
        await close(writer)


@pytest.mark.parametrize(
    ("behaviour", "result"),
    [
        (refuses(Status.ERROR, "CKR_FUNCTION_FAILED: no"), "hsm_unavailable"),
        (refuses(Status.RETRY, "CKR_DEVICE_ERROR: no"), "hsm_unavailable"),
        (refuses(Status.NO_KEY), "hsm_unavailable"),
        (refuses(Status.POLICY, "tbs-form"), "policy_rejected"),
        (answers_bytes(b"\xff" * 64), "hsm_unavailable"),
        (dies, "hsm_unavailable"),
        (never_answers, "sign_timeout"),
    ],
    ids=["error", "retryable error", "no key", "policy", "garbage", "dies", "silent"],
)
async def test_a_signature_that_fails_is_a_clean_alert(tmp_path: Path, behaviour: Behaviour, result: str) -> None:
    async with site(tmp_path, sign_deadline="300ms") as it:
        reader, writer = await it.connect()
        it.signer.behaviour = behaviour
        with pytest.raises(ssl.SSLError) as caught:
            await it.handshake()
        assert caught.value.reason == "TLSV1_ALERT_INTERNAL_ERROR"
        await request(reader, writer)
        it.signer.behaviour = signs
        for _ in range(200):
            with contextlib.suppress(ssl.SSLError):
                await it.handshake()
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("it never recovered")
        assert it.count(metrics.HANDSHAKES, result=result) >= 1
        await close(writer)
        await it.settled()


async def test_a_wrong_signature_is_refused_by_the_client(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        it.signer.behaviour = in_turn(signs_with_another_key, signs)
        with pytest.raises(ssl.SSLError) as caught:
            await it.handshake()
        assert caught.value.reason == "BAD_SIGNATURE"
        await it.handshake()
        await it.settled()
        assert it.count(metrics.HANDSHAKES, result="ok") == 1
        assert it.count(metrics.HANDSHAKES) == 2


def client_hello(context: ssl.SSLContext) -> bytes:
    """Return the first flight of a client."""
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


async def begin(it: Site, hello: bytes) -> asyncio.StreamWriter:
    """Connect and send a ClientHello."""
    _, writer = await asyncio.open_connection("127.0.0.1", it.port)
    writer.write(hello)
    return writer


async def vanish(writer: asyncio.StreamWriter, how: int) -> None:
    """Leave: by FIN, by RST, or after extra bytes."""
    if how == 1:
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    elif how == 2:
        writer.write(b"\x17\x03\x03\x00\x20" + bytes(32))
    await close(writer)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


async def test_3000_clients_that_vanish_mid_signature_leave_nothing_behind(tmp_path: Path) -> None:
    async with site(tmp_path) as it:
        hello = client_hello(it.context)
        pid = it.process.pid
        assert pid is not None

        async def wave(count: int) -> None:
            for _ in range(count // 100):
                signatures_may_come = asyncio.Event()
                it.signer.behaviour = held_until(signatures_may_come)
                asked = len(it.signer.requests)
                writers = await asyncio.gather(*(begin(it, hello) for _ in range(100)))
                await asyncio.wait_for(it.signer.received(asked + 100), 30)
                await asyncio.gather(*(vanish(writer, number % 3) for number, writer in enumerate(writers)))
                await it.settled()
                # The signatures come too late: nobody waits for them any more.
                signatures_may_come.set()

        await wave(600)
        before = resident_bytes(pid)
        await wave(3000)
        assert resident_bytes(pid) - before < 8 << 20
        it.signer.behaviour = signs
        await it.handshake()
        await it.settled()
        assert it.process.pid == pid
        assert it.count(metrics.HANDSHAKES, result="ok") == 1
        assert it.count(metrics.HANDSHAKES) == 3601
        await it.until(lambda: it.count(PENDING) == 0, "nothing pending")
