"""How servers are chosen, given up, asked again, waited for and connected to."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsm.messages import KeyType
from tests.backends import BackendConnection, Handler, always, backend, ok
from tests.dataplane import AUTHORITY, DataPlane, TlsClient, big, data_plane, until
from tests.proxy import free_port
from tests.unit.tls.peers import generate_key
from tlsproxy.config import (
    Address,
    Balance,
    EjectionConfig,
    HashConfig,
    HashSource,
    HealthConfig,
    ListenerMode,
    UnixAddress,
    UpstreamTlsConfig,
)

GET = "GET / HTTP/1.1\nHost: a"
UP = "tlsproxy_upstream_server_up"
HEALTH = HealthConfig(path="/healthz", host=None, interval_s=0.02, timeout_s=1.0, rise=2, fall=2)


def server_name(port: int) -> str:
    return f"127.0.0.1:{port}"


async def closing(connection: BackendConnection) -> None:
    """Take a request and close without an answer."""
    await connection.head()


async def bodies(client: TlsClient, count: int, head: str = GET) -> Counter[bytes]:
    return Counter([(await client.request(head)).body for _ in range(count)])


@contextlib.asynccontextmanager
async def named_backends(*names: bytes) -> AsyncIterator[list[int]]:
    """Run back ends that answer with their names."""
    async with contextlib.AsyncExitStack() as stack:
        yield [(await stack.enter_async_context(backend(always(ok(name))))).port for name in names]


# Balancing.


async def test_weights_share_requests_out() -> None:
    async with (
        named_backends(b"one", b"two") as ports,
        data_plane(ports, servers={"weight": [3, 1]}) as running,
    ):
        assert await bodies(await running.connect(), 8) == {b"one": 6, b"two": 2}


@pytest.mark.parametrize(
    ("source", "head"), [(HashSource.HEADER, "X-User: {}"), (HashSource.COOKIE, "Cookie: x=1; sid={}")]
)
async def test_requests_that_share_a_header_or_cookie_go_to_the_same_server(source: HashSource, head: str) -> None:
    name = "X-User" if source is HashSource.HEADER else "sid"
    upstream = {"balance": Balance.CONSISTENT_HASH, "hash": HashConfig(source, name)}
    async with named_backends(b"one", b"two", b"three") as ports, data_plane(ports, upstream=upstream) as running:
        client = await running.connect()
        seen = set()
        for user in range(20):
            found = await bodies(client, 3, f"{GET}\n{head.format(user)}")
            assert len(found) == 1
            seen |= found.keys()
        assert seen == {b"one", b"two", b"three"}


async def test_the_client_hashed_is_the_one_a_trusted_proxy_names() -> None:
    upstream = {"balance": Balance.CONSISTENT_HASH}
    listener = {"trusted_proxies": (ipaddress.ip_network("127.0.0.1"),)}
    async with (
        named_backends(b"one", b"two") as ports,
        data_plane(ports, upstream=upstream, listener=listener) as running,
    ):
        client = await running.connect()
        found = [await bodies(client, 2, f"{GET}\nX-Forwarded-For: 192.0.2.{i}") for i in range(20)]
        assert all(len(one_client) == 1 for one_client in found)
        assert len({body for one_client in found for body in one_client}) == 2
        assert len(await bodies(client, 5)) == 1


# Failing servers.


async def test_a_server_that_closes_without_an_answer_is_passed_over() -> None:
    async with (
        backend(closing) as broken,
        named_backends(b"two") as (working,),
        data_plane([broken.port, working]) as running,
    ):
        client = await running.connect()
        assert await bodies(client, 4) == {b"two": 4}
        assert running.counted("tlsproxy_upstream_retries_total") == {("app",): 2}
        assert not running.counted("tlsproxy_upstream_errors_total")


@pytest.mark.parametrize(("method", "body"), [("POST", b""), ("PUT", b"x")])
async def test_what_may_have_had_an_effect_is_not_sent_to_another_server(method: str, body: bytes) -> None:
    head = f"{method} / HTTP/1.1\nHost: a\nContent-Length: {len(body)}"
    async with (
        backend(closing) as broken,
        named_backends(b"two") as (working,),
        data_plane([broken.port, working]) as running,
    ):
        assert (await (await running.connect()).request(head, body)).status == 502


async def test_retries_end() -> None:
    async with contextlib.AsyncExitStack() as stack:
        broken = [await stack.enter_async_context(backend(closing)) for _ in range(4)]
        running = await stack.enter_async_context(
            data_plane([server.port for server in broken], upstream={"retries": 2})
        )
        assert (await (await running.connect()).request(GET)).status == 502
        assert sum(len(server.connections) for server in broken) == 3


async def test_a_server_that_fails_repeatedly_is_ejected_and_comes_back() -> None:
    async with (
        backend(closing) as broken,
        named_backends(b"two") as (working,),
        data_plane([broken.port, working], upstream={"ejection": EjectionConfig(2, 0.2)}) as running,
    ):
        client = await running.connect()
        assert await bodies(client, 10) == {b"two": 10}
        assert len(broken.connections) == 2
        assert running.counted(UP) == {("app", server_name(working)): 1}
        assert running.counted("tlsproxy_upstream_ejections_total") == {("app", server_name(broken.port)): 1}

        def is_back() -> bool:
            running.sweep()
            return len(running.counted(UP)) == 2

        await until(is_back)
        await bodies(client, 4)
        assert len(broken.connections) == 3
        assert running.counted("tlsproxy_upstream_ejections_total") == {("app", server_name(broken.port)): 2}


async def test_a_server_that_is_the_only_one_is_used_though_ejected() -> None:
    answers = iter([b"", b"", ok()])

    async def recovering(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(next(answers))

    async with (
        backend(recovering) as app,
        data_plane(app.port, upstream={"ejection": EjectionConfig(1, 60)}) as running,
    ):
        client = await running.connect()
        statuses = [(await client.request(GET)).status for _ in range(3)]
        assert statuses == [502, 502, 200]


async def test_failures_that_are_not_in_a_row_eject_no_server() -> None:
    answers = iter([b"", ok(), b"", ok(), b"", ok()])

    async def unsteady(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(next(answers))

    async with backend(unsteady) as app, data_plane(app.port, upstream={"ejection": EjectionConfig(2, 60)}) as running:
        client = await running.connect()
        assert [(await client.request(GET)).status for _ in range(6)] == [502, 200, 502, 200, 502, 200]
        assert not running.counted("tlsproxy_upstream_ejections_total")


# Health checks.


async def test_a_server_whose_health_check_fails_gets_no_requests_until_it_passes_again() -> None:
    healthy = True

    async def app(connection: BackendConnection) -> None:
        while head := await connection.head():
            if head.startswith(b"GET /healthz "):
                assert b"\r\nConnection: close\r\n" in head
                await connection.send(ok() if healthy else b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\n\r\n")
                return
            await connection.send(ok(b"one"))

    async with (
        backend(app) as one,
        named_backends(b"two") as (two,),
        data_plane([one.port, two], upstream={"health": HEALTH}) as running,
    ):
        client = await running.connect()
        assert await bodies(client, 4) == {b"one": 2, b"two": 2}
        healthy = False
        await until(lambda: running.counted(UP) == {("app", server_name(two)): 1})
        assert await bodies(client, 4) == {b"two": 4}
        healthy = True
        await until(lambda: len(running.counted(UP)) == 2)
        assert await bodies(client, 4) == {b"one": 2, b"two": 2}


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 404 Not Found\r\n\r\n", b"nonsense\r\n\r\n", None])
async def test_without_a_healthy_server_requests_fail_at_once(answer: bytes | None) -> None:
    async def app(connection: BackendConnection) -> None:
        await connection.head()
        if answer is None:
            await connection.read()
        else:
            await connection.send(answer)

    health = HealthConfig("/h", "inside.example", 0.02, timeout_s=0.05, rise=1, fall=1)
    async with backend(app) as server, data_plane(server.port, upstream={"health": health}) as running:
        await until(lambda: not running.counted(UP))
        response = await (await running.connect()).request(GET)
        assert (response.status, response.field("connection")) == (503, None)
        assert running.counted("tlsproxy_upstream_errors_total") == {("app", "no_server"): 1}
        assert server.received.startswith(b"GET /h HTTP/1.1\r\nHost: inside.example\r\n")
        assert b"GET / " not in server.received


async def test_a_health_check_without_a_path_is_a_connection() -> None:
    health = HealthConfig(None, None, 0.02, 1.0, rise=1, fall=1)
    async with backend() as server:
        ports = [server.port]
        async with data_plane(ports, upstream={"health": health}) as running:
            await until(lambda: len(server.connections) > 2)
            assert running.counted(UP) == {("app", server_name(server.port)): 1}
            assert server.received == b""


# Limits.


def gate() -> tuple[asyncio.Event, Handler]:
    opened = asyncio.Event()

    async def handler(connection: BackendConnection) -> None:
        while await connection.head():
            await opened.wait()
            await connection.send(ok())

    return opened, handler


async def send(running: DataPlane, count: int) -> list[TlsClient]:
    """Send requests of as many clients, one after the other: each has a connection, or waits, before the next."""
    clients = []
    for i in range(count):
        clients.append(await running.connect())
        await clients[i].send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda i=i: _asked(running) == i + 1)
    return clients


def _asked(running: DataPlane) -> float:
    active = running.counted("tlsproxy_upstream_connections").get(("app", "active"), 0)
    return active + running.counted("tlsproxy_upstream_waiting").get(("app",), 0)


async def test_requests_wait_for_a_server_that_has_as_many_connections_as_it_may() -> None:
    opened, handler = gate()
    async with (
        backend(handler) as server,
        data_plane(server.port, servers={"max_connections": 2}, upstream={"queue": 3}) as running,
    ):
        clients = await send(running, 5)
        await until(lambda: running.counted("tlsproxy_upstream_waiting") == {("app",): 3})
        assert (await (await running.connect()).request(GET)).status == 503
        assert running.counted("tlsproxy_upstream_errors_total") == {("app", "queue_full"): 1}
        # One that leaves gives its place up.
        clients.pop().vanish()
        await until(lambda: running.counted("tlsproxy_upstream_waiting") == {("app",): 2})
        opened.set()
        assert [(await client.response()).status for client in clients] == [200] * 4
        assert len(server.connections) == 2


async def test_a_request_that_has_waited_too_long_is_503() -> None:
    _, handler = gate()
    async with (
        backend(handler) as server,
        data_plane(server.port, servers={"max_connections": 1}, upstream_timeouts={"queue_s": 0.0}) as running,
    ):
        clients = await send(running, 2)
        await until(lambda: running.counted("tlsproxy_upstream_waiting"))
        running.sweep()
        assert (await clients[1].response()).status == 503
        assert running.counted("tlsproxy_upstream_errors_total") == {("app", "queue_timeout"): 1}


async def test_a_connection_lost_makes_room_for_who_waits() -> None:
    async def first_never_answers(connection: BackendConnection) -> None:
        await connection.head()
        if len(server.connections) > 1:
            await connection.send(ok())
        await connection.read()

    async with (
        backend(first_never_answers) as server,
        data_plane(server.port, servers={"max_connections": 1}) as running,
    ):
        stuck, waits = await send(running, 2)
        await until(lambda: running.counted("tlsproxy_upstream_waiting"))
        stuck.vanish()
        assert (await waits.response()).status == 200


# Where servers are.


async def test_a_server_behind_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    async with backend(unix_path=path) as server, data_plane([0], servers={"address": UnixAddress(path)}) as running:
        client = await running.connect()
        assert await bodies(client, 2) == {b"hello": 2}
        assert (await client.request("GET / HTTP/1.0")).status == 200
        assert b"GET / HTTP/1.1\r\nHost: localhost\r\n" in server.received


def resolving_to(monkeypatch: pytest.MonkeyPatch, names: Mapping[str, list[str]]) -> None:
    """Make names stand for what `names` says at the time of asking."""

    async def look_up(address: Address) -> list[Address]:
        if address.host not in names:
            raise OSError("no such name")
        return [Address(host, address.port) for host in names[address.host]]

    monkeypatch.setattr("tlsproxy.serve.resolving.look_up", look_up)


async def test_all_addresses_of_a_name_are_servers_and_names_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"app.test": ["127.0.0.1", "127.0.0.2"]}
    resolving_to(monkeypatch, names)
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        for i in (1, 2, 3):
            body = b"%d" % i
            await stack.enter_async_context(backend(always(ok(body)), host=f"127.0.0.{i}", port=port))
        running = await stack.enter_async_context(
            data_plane([0], servers={"address": Address("app.test", port)}, upstream={"resolve_interval_s": 0.02})
        )
        client = await running.connect()
        assert await bodies(client, 4) == {b"1": 2, b"2": 2}
        names["app.test"] = ["127.0.0.3", "127.0.0.2"]
        await until(lambda: _idle(running) == 1)
        assert await bodies(client, 4) == {b"2": 2, b"3": 2}
        # A name that can't be resolved for a while leaves what was known.
        del names["app.test"]
        await asyncio.sleep(0.1)
        assert await bodies(client, 4) == {b"2": 2, b"3": 2}


def _idle(running: DataPlane) -> float:
    return running.counted("tlsproxy_upstream_connections").get(("app", "idle"), 0)


async def test_localhost_is_resolved_by_the_system() -> None:
    async with (
        backend() as server,
        data_plane([0], servers={"address": Address("localhost", server.port)}) as running,
    ):
        assert await bodies(await running.connect(), 2) == {b"hello": 2}


async def test_an_address_of_a_name_that_never_answers_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tlsproxy.upstream")
    port = free_port()
    resolving_to(monkeypatch, {"app.test": ["127.0.0.1", "127.0.0.2"]})

    def told() -> list[tuple[str, str, object]]:
        records = [record for record in caplog.records if record.msg != "name resolved"]
        return [(record.levelname, record.msg, record.__dict__["address"]) for record in records]

    async with (
        backend(port=port),
        data_plane(
            [0], servers={"address": Address("app.test", port)}, upstream={"ejection": EjectionConfig(1, 0.01)}
        ) as running,
    ):
        client = await running.connect()
        name = ("app", f"app.test:{port}")

        async def ejections() -> float:
            await asyncio.sleep(0.01)
            running.sweep()
            assert await bodies(client, 2) == {b"hello": 2}
            assert running.counted(UP) == {name: 1}
            return running.counted("tlsproxy_upstream_ejections_total").get(name, 0)

        while await ejections() < 3:
            pass
        ejected = ("WARNING", "server ejected", f"127.0.0.2:{port}")
        assert told() == [ejected]
        async with backend(host="127.0.0.2", port=port):
            while len(told()) == 1:
                await ejections()
        assert told() == [ejected, ("INFO", "server answers again", f"127.0.0.2:{port}")]


async def test_a_name_that_is_not_found_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "tlsproxy.upstream")
    names: dict[str, list[str]] = {}
    resolving_to(monkeypatch, names)
    address = Address("app.test", 8000)
    async with data_plane([0], servers={"address": address}, upstream={"resolve_interval_s": 0.01}):
        await until(lambda: len(caplog.records) > 3)
        names["app.test"] = ["127.0.0.1"]
        await until(lambda: caplog.records[-1].msg == "name resolved")
        del names["app.test"]
        await until(lambda: caplog.records[-1].msg == "name not resolved")
    told = [record.msg for record in caplog.records if record.levelno > logging.DEBUG]
    assert told == ["name not resolved", "name resolved", "name not resolved"]


async def test_a_name_that_stands_for_nothing_is_503_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, list[str]] = {}
    resolving_to(monkeypatch, names)
    async with (
        backend() as server,
        data_plane(
            [0], servers={"address": Address("app.test", server.port)}, upstream={"resolve_interval_s": 0.02}
        ) as running,
    ):
        client = await running.connect()
        assert (await client.request(GET)).status == 503
        assert not running.counted(UP)
        names["app.test"] = ["127.0.0.1"]
        await until(lambda: running.counted(UP) == {("app", f"app.test:{server.port}"): 1})
        assert await bodies(client, 2) == {b"hello": 2}


# TLS to servers.


def tls_server(directory: Path) -> ssl.SSLContext:
    """Return the context of a server for `localhost`, issued by the tests' authority."""
    key = generate_key(KeyType.ECDSA_P256)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = directory / "backend.pem"
    path.write_bytes(pem + AUTHORITY.chain_pem(key, [x509.DNSName("localhost")]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


CA_PEM = AUTHORITY.root.public_bytes(Encoding.PEM).decode()


async def test_a_server_is_verified_by_name_and_kept(tmp_path: Path) -> None:
    tls = UpstreamTlsConfig(True, CA_PEM, "localhost")
    context = tls_server(tmp_path)
    names = []
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    async with backend(tls=context) as server, data_plane(server.port, upstream={"tls": tls}) as running:
        assert await bodies(await running.connect(), 3) == {b"hello": 3}
        assert names == ["localhost"]


@pytest.mark.parametrize(
    "tls",
    [
        UpstreamTlsConfig(True, CA_PEM, "other.example"),
        UpstreamTlsConfig(True, CA_PEM, None),
        UpstreamTlsConfig(True, None, "localhost"),
    ],
    ids=["another name", "the address", "an authority the system does not know"],
)
async def test_a_server_that_is_not_who_it_should_be_gets_nothing(tmp_path: Path, tls: UpstreamTlsConfig) -> None:
    async with backend(tls=tls_server(tmp_path)) as server, data_plane(server.port, upstream={"tls": tls}) as running:
        assert (await (await running.connect()).request(GET)).status == 502
        assert running.counted("tlsproxy_upstream_errors_total") == {("app", "tls_failed"): 1}
        assert not server.received


async def test_verification_can_be_off(tmp_path: Path) -> None:
    tls = UpstreamTlsConfig(False, None, None)
    async with backend(tls=tls_server(tmp_path)) as server, data_plane(server.port, upstream={"tls": tls}) as running:
        assert await bodies(await running.connect(), 1) == {b"hello": 1}


async def test_large_bodies_both_ways_over_tls(tmp_path: Path) -> None:
    body = big(4 << 20)

    async def echo(connection: BackendConnection) -> None:
        await connection.head()
        await connection.send(ok(await connection.exactly(len(body))))

    tls = UpstreamTlsConfig(True, CA_PEM, "localhost")
    async with (
        backend(echo, tls=tls_server(tmp_path)) as server,
        data_plane(server.port, upstream={"tls": tls}) as running,
    ):
        client = await running.connect()
        response = await client.request(f"POST / HTTP/1.1\nHost: a\nContent-Length: {len(body)}", body)
        assert response.body == body


@pytest.mark.parametrize("answer", [b"", b"bye"])
async def test_a_tls_server_that_closes_its_tunnel(
    tmp_path: Path, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def greet(connection: BackendConnection) -> None:
        await connection.send(answer)

    tls = UpstreamTlsConfig(True, CA_PEM, "localhost")
    async with (
        backend(greet, tls=tls_server(tmp_path)) as server,
        data_plane(server.port, upstream={"tls": tls}, mode=ListenerMode.TCP) as running,
    ):
        client = await running.connect()
        assert await client.until_end() == answer
        assert client.end == "close_notify"
        assert not caplog.records


async def test_refusals_by_a_tunnels_server_that_are_not_in_a_row_do_not_eject_it() -> None:
    async def greet(connection: BackendConnection) -> None:
        await connection.send(b"hi")

    port = free_port()
    async with data_plane([port], mode=ListenerMode.TCP, upstream={"ejection": EjectionConfig(2, 60)}) as running:
        for _ in range(3):
            assert await (await running.connect()).until_end() == b""
            async with backend(greet, port=port):
                assert await (await running.connect()).until_end() == b"hi"
        assert running.counted("tlsproxy_upstream_errors_total") == {("app", "connect_failed"): 3}
        assert not running.counted("tlsproxy_upstream_ejections_total")


async def test_a_tunnel_to_a_tls_server(tmp_path: Path) -> None:
    async def echo(connection: BackendConnection) -> None:
        while data := await connection.read():
            await connection.send(data)

    tls = UpstreamTlsConfig(True, CA_PEM, "localhost")
    async with (
        backend(echo, tls=tls_server(tmp_path)) as server,
        data_plane(server.port, upstream={"tls": tls}, mode=ListenerMode.TCP) as running,
    ):
        client = await running.connect()
        await client.send(b"abc")
        while client.buffer != b"abc":
            assert await client.more()
        client.send_close_notify()
        await client.until_end()
        assert client.end == "close_notify"
