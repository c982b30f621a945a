"""The PROXY protocol in both directions: who the client is, said before TLS."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from tests.backends import BackendConnection, backend, ok
from tests.dataplane import DataPlane, TlsClient, data_plane, until
from tests.integration.data_plane.test_upstreams import CA_PEM, HEALTH, tls_server
from tlsproxy.config import Address, HealthConfig, ListenerMode, ProxyProtocol, UnixAddress, UpstreamTlsConfig
from tlsproxy.proxy_protocol import Endpoints, parse_header, v1_header, v2_header

FROM_LOOPBACK = {"proxy_protocol_from": (ipaddress.ip_network("127.0.0.0/8"),)}
CLIENT = Endpoints(Address("192.0.2.1", 1234), Address("198.51.100.7", 443))
GET = "GET / HTTP/1.1\nHost: a"
REFUSED = "tlsproxy_connections_refused_total"


async def connect_with(running: DataPlane, header: bytes) -> TlsClient:
    client = await running.open()
    client.writer.write(header)
    await client.shake_hands()
    return client


@pytest.mark.parametrize(
    ("header", "address"),
    [
        (v1_header(CLIENT), b"192.0.2.1"),
        (v2_header(CLIENT, None), b"192.0.2.1"),
        (v2_header(Endpoints(Address("2001:db8::1", 1), Address("::1", 2)), None), b"2001:db8::1"),
        (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.7 1 2\r\n", b"192.0.2.1"),
        (v2_header(Endpoints(Address("::ffff:192.0.2.1", 1), Address("2001:db8::1", 2)), None), b"192.0.2.1"),
        (v1_header(None), b"127.0.0.1"),
        (v2_header(None, None), b"127.0.0.1"),
    ],
)
async def test_the_header_tells_who_the_client_is(header: bytes, address: bytes) -> None:
    async with backend() as server, data_plane(server.port, listener=FROM_LOOPBACK) as running:
        client = await connect_with(running, header)
        assert (await client.request(GET)).status == 200
        assert b"\r\nX-Forwarded-For: %b\r\n" % address in server.received


async def test_a_header_in_pieces_and_together_with_what_follows() -> None:
    async with backend() as server, data_plane(server.port, listener=FROM_LOOPBACK, tls=False) as running:
        client = await running.connect_plain()
        header = v2_header(CLIENT, None)
        for byte in header[:-1]:
            client.writer.write(bytes([byte]))
            await client.writer.drain()
        client.writer.write(header[-1:] + b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response()).status == 200
        assert b"\r\nX-Forwarded-For: 192.0.2.1\r\n" in server.received


@pytest.mark.parametrize("tls", [True, False])
async def test_a_listed_peer_must_send_the_header(tls: bool) -> None:
    async with backend() as server, data_plane(server.port, listener=FROM_LOOPBACK, tls=tls) as running:
        client = await running.open()
        client.writer.write(client.tls.step() if tls else b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not await client.more()
        assert running.counted(REFUSED) == {("test", "proxy_protocol"): 1}
        assert not server.connections


async def test_a_peer_that_is_not_listed_is_not_believed() -> None:
    listener = {"proxy_protocol_from": (ipaddress.ip_network("192.0.2.0/24"),)}
    async with backend() as server, data_plane(server.port, listener=listener, tls=False) as running:
        client = await running.connect_plain()
        client.writer.write(v1_header(CLIENT) + b"\r\n")
        assert (await client.response()).status == 400
        assert not server.connections


async def test_a_header_that_does_not_come_is_timed_out() -> None:
    async with data_plane(1, listener=FROM_LOOPBACK, timeouts={"handshake_s": 0.0}) as running:
        client = await running.open()
        client.writer.write(b"PROXY TCP4 ")
        await until(lambda: running.runtime.connections == 1)
        running.sweep()
        assert not await client.more()


async def test_a_client_that_leaves_before_its_header_leaves_nothing() -> None:
    async with data_plane(1, listener=FROM_LOOPBACK) as running:
        client = await running.open()
        await until(lambda: running.runtime.connections == 1)
        client.writer.write_eof()
        await until(lambda: running.runtime.connections == 0)


async def test_limits_are_for_the_client_that_is_told_not_for_the_proxy_before() -> None:
    async with (
        backend() as server,
        data_plane(server.port, listener=FROM_LOOPBACK, limits={"connections_per_client": 1}) as running,
    ):
        first = await connect_with(running, v1_header(CLIENT))
        other = Endpoints(Address("192.0.2.2", 1), CLIENT.server)
        second = await connect_with(running, v1_header(other))
        with pytest.raises(ConnectionError):
            await connect_with(running, v1_header(CLIENT))
        assert running.counted(REFUSED) == {("test", "connections_per_client"): 1}
        for client in (first, second):
            assert (await client.request(GET)).status == 200
        first.vanish()
        await until(lambda: running.runtime.connections == 1)
        assert (await (await connect_with(running, v1_header(CLIENT))).request(GET)).status == 200


async def test_the_addresses_of_an_ipv6_network_are_one_client() -> None:
    def header(host: str) -> bytes:
        return v1_header(Endpoints(Address(host, 1), Address("2001:db8::ffff", 443)))

    async with (
        backend() as server,
        data_plane(server.port, listener=FROM_LOOPBACK, limits={"connections_per_client": 1}) as running,
    ):
        first = await connect_with(running, header("2001:db8::1"))
        with pytest.raises(ConnectionError):
            await connect_with(running, header("2001:db8::2"))
        await connect_with(running, header("2001:db8:0:1::1"))
        first.vanish()
        await until(lambda: running.runtime.connections == 1)
        assert (await (await connect_with(running, header("2001:db8::2"))).request(GET)).status == 200


# Towards servers.


async def read_header(connection: BackendConnection) -> Any:
    data = b""
    while (header := parse_header(data)) is None:
        data += await connection.exactly(1)
    return header


def proxied_app(headers: list[Any]) -> Any:
    async def app(connection: BackendConnection) -> None:
        headers.append(await read_header(connection))
        while await connection.head():
            await connection.send(ok())

    return app


@pytest.mark.parametrize("version", ProxyProtocol)
async def test_servers_are_told_and_no_connection_serves_two_clients(version: ProxyProtocol) -> None:
    headers: list[Any] = []
    async with (
        backend(proxied_app(headers)) as server,
        data_plane(server.port, upstream={"proxy_protocol": version, "keepalive": 0}) as running,
    ):
        ports = []
        for _ in range(2):
            client = await running.connect()
            ports.append(client.writer.get_extra_info("sockname")[1])
            for _ in range(2):
                assert (await client.request(GET)).status == 200
        assert [header.endpoints.client.port for header in headers] == [ports[0], ports[0], ports[1], ports[1]]
        assert {header.endpoints.server for header in headers} == {Address("127.0.0.1", running.port)}


async def test_version_2_tells_of_tls() -> None:
    async def app(connection: BackendConnection) -> None:
        await connection.read(16)
        await connection.head()
        await connection.send(ok())

    async with (
        backend(app) as server,
        data_plane(server.port, upstream={"proxy_protocol": ProxyProtocol.V2, "keepalive": 0}) as running,
    ):
        client = await running.connect()
        assert (await client.request(GET)).status == 200
        header = server.received[: server.received.index(b"GET ")]
        cipher, version, _ = client.tls.tls.cipher()
        for value in (b"\x21\x00\x07" + version.encode(), b"\x23\x00\x16" + cipher.encode(), b"\x02\x00\x09localhost"):
            assert value in header


async def test_what_the_proxy_before_said_is_passed_on() -> None:
    headers: list[Any] = []
    async with (
        backend(proxied_app(headers)) as server,
        data_plane(
            server.port, listener=FROM_LOOPBACK, upstream={"proxy_protocol": ProxyProtocol.V1, "keepalive": 0}
        ) as running,
    ):
        assert (await (await connect_with(running, v2_header(CLIENT, None))).request(GET)).status == 200
        assert headers[0].endpoints == CLIENT


async def test_the_header_comes_before_tls_and_over_unix_sockets_too(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    headers: list[Any] = []
    settings = {"proxy_protocol": ProxyProtocol.V2, "keepalive": 0}
    async with (
        backend(proxied_app(headers), unix_path=path),
        data_plane([0], servers={"address": UnixAddress(path)}, upstream=settings) as running,
    ):
        assert (await (await running.connect()).request(GET)).status == 200
        assert headers[0].endpoints.client.host == "127.0.0.1"

    async def app(connection: BackendConnection) -> None:
        headers.append(await read_header(connection))
        await connection.writer.start_tls(tls_server(tmp_path))
        await connection.head()
        await connection.send(ok(b"inside"))

    tls = UpstreamTlsConfig(True, CA_PEM, "localhost")
    async with backend(app) as server, data_plane(server.port, upstream={**settings, "tls": tls}) as running:
        assert (await (await running.connect()).request(GET)).body == b"inside"
        assert len(headers) == 2


async def test_a_tunnel_begins_with_the_header() -> None:
    async def app(connection: BackendConnection) -> None:
        header = await read_header(connection)
        await connection.send(header.endpoints.client.host.encode())

    async with (
        backend(app) as server,
        data_plane(
            server.port, mode=ListenerMode.TCP, upstream={"proxy_protocol": ProxyProtocol.V1, "keepalive": 0}
        ) as running,
    ):
        assert await (await running.connect()).until_end() == b"127.0.0.1"


async def test_health_checks_speak_for_the_proxy_itself() -> None:
    headers: list[Any] = []
    health = HealthConfig("/", None, 60, 1.0, HEALTH.rise, HEALTH.fall)
    async with (
        backend(proxied_app(headers)) as server,
        data_plane(server.port, upstream={"proxy_protocol": ProxyProtocol.V2, "health": health}),
    ):
        await until(lambda: headers and b"GET / " in server.received)
        assert headers[0].endpoints is None
