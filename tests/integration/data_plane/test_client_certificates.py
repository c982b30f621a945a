"""Clients' certificates over real sockets: whom a listener serves, what servers are told of them, what is counted."""

from __future__ import annotations

import asyncio
import base64
import logging
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from tests.backends import BackendConnection, backend, ok
from tests.client_cas import DAY, NOW, ClientCa, IssuedClient
from tests.dataplane import AUTHORITY, DataPlane, TlsClient, data_plane, until
from tests.http2_client import Http2Client
from tests.unit.tls.peers import Client, client_context
from tests.unit.tls.test_client_certificates import forged
from tlsproxy.config import Address, ListenerMode, ProxyProtocol
from tlsproxy.proxy_protocol import ClientShown, Endpoints, TlsDetails, v2_header
from tlsproxy.tls.client_authorities import client_authorities, load_client_cas, load_crls
from tlsproxy.tls.client_certificates import ClientVerification

ROOT = ClientCa()
ALICE = ROOT.issue()
REVOKED = ROOT.issue("mallory")
CAS = load_client_cas(ROOT.pem(), "ca.pem")
AUTHORITIES = client_authorities(CAS, load_crls(ROOT.crl(REVOKED), CAS, "crl.pem"))
REQUIRED = ClientVerification(AUTHORITIES, required=True, depth=1)
OPTIONAL = ClientVerification(AUTHORITIES, required=False, depth=1)
GET = "GET / HTTP/1.1\nHost: a"
HANDSHAKES = "tlsproxy_handshakes_total"
CLIENTS = "tlsproxy_client_certificates_total"
VERSIONS = ["TLSv1.2", "TLSv1.3"]


def context_of(certificate: IssuedClient | None, version: str = "TLSv1.3") -> ssl.SSLContext:
    context = client_context(AUTHORITY, tls12=version == "TLSv1.2")
    return context if certificate is None else certificate.used_by(context)


async def connect(running: DataPlane, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> TlsClient:
    client = await running.open()
    client.tls = Client(context, "localhost", session)
    await client.shake_hands()
    return client


@pytest.mark.parametrize("version", VERSIONS)
async def test_servers_are_told_the_certificate_of_a_client_and_no_other(version: str) -> None:
    async with backend() as server, data_plane(server.port, client_verification=OPTIONAL) as running:
        lie = f"{GET}\nClient-Cert: :bGllcw==:\nClient_Cert: :bGllcw==:\nClient-Cert-Chain: :bGllcw==:"
        alice = await connect(running, context_of(ALICE, version))
        assert (await alice.request(lie)).status == 200
        assert (await alice.request(lie)).status == 200
        said = b"\r\nClient-Cert: :%b:\r\n" % base64.b64encode(ALICE.der)
        assert server.received.count(said) == 2
        nobody = await connect(running, context_of(None, version))
        assert (await nobody.request(lie)).status == 200
        assert server.received.lower().count(b"\r\nclient") == 2
        assert running.counted(CLIENTS) == {("test", "verified"): 1, ("test", "missing"): 1}


async def test_servers_are_told_for_each_request_in_http_2_too(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "tlsproxy.access")
    listener = {"http2": True}
    async with backend() as server, data_plane(server.port, listener=listener, client_verification=OPTIONAL) as running:
        lies = [(b"client-cert", b":bGllcw==:"), (b"client_cert", b":bGllcw==:"), (b"client-cert-chain", b":bGllcw==:")]
        for certificate in (ALICE, None):
            context = client_context(AUTHORITY, alpn=["h2"])
            tls = await connect(running, context if certificate is None else certificate.used_by(context))
            client = Http2Client(tls)
            await client.flush()
            for _ in range(2):
                assert (await client.get(fields=lies)).status == 200
        assert server.received.count(b"\r\nClient-Cert: :%b:\r\n" % base64.b64encode(ALICE.der)) == 2
        assert server.received.lower().count(b"\r\nclient") == 2
    logged = [record.client_subject for record in caplog.records if record.message == "request"]
    assert logged == ["CN=alice", "CN=alice", None, None]


async def test_a_listener_that_asks_nobody_tells_of_nobody() -> None:
    async with backend() as server, data_plane(server.port) as running:
        client = await connect(running, context_of(ALICE))
        assert (await client.request(f"{GET}\nClient-Cert: :bGllcw==:")).status == 200
        assert b"client-cert" not in server.received.lower()
        assert running.counted(CLIENTS, zeros=True) == {}


@pytest.mark.parametrize("version", VERSIONS)
async def test_who_resumes_is_still_the_same_client(version: str) -> None:
    async with backend() as server, data_plane(server.port, client_verification=REQUIRED) as running:
        context = context_of(ALICE, version)
        first = await connect(running, context)
        assert (await first.request(GET)).status == 200
        resumed = await connect(running, context, first.tls.tls.session)
        assert (await resumed.request(GET)).status == 200
        assert server.received.count(base64.b64encode(ALICE.der)) == 2
        assert running.counted(HANDSHAKES) == {("test", "ok", "false", version): 1, ("test", "ok", "true", version): 1}
        assert running.counted(CLIENTS) == {("test", "verified"): 2}


BAD: list[tuple[IssuedClient | None, str, str, str]] = [
    (None, "missing", "none was sent", r"(?i)certificate.required|handshake.failure"),
    (REVOKED, "refused", "certificate revoked", r"(?i)certificate.revoked"),
    (ROOT.issue(not_after=NOW - DAY / 2), "refused", "certificate has expired", r"(?i)certificate.expired"),
    (ClientCa("x").issue(), "refused", "unable to get local issuer certificate", r"(?i)unknown.ca"),
    (forged(ALICE), "refused", "certificate signature failure", r"(?i)decrypt.error"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("certificate", "result", "reason", "alert"), BAD, ids=[case[2] for case in BAD])
async def test_who_is_refused_gets_an_alert_and_no_byte_to_a_server(
    version: str, certificate: IssuedClient | None, result: str, reason: str, alert: str, caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "tlsproxy.handshake")
    async with backend() as server, data_plane(server.port, client_verification=REQUIRED) as running:
        with pytest.raises(ssl.SSLError, match=alert):
            # In TLS 1.3 the client's handshake is over before the server has looked at its certificate.
            await (await connect(running, context_of(certificate, version))).request(GET)
        await until(lambda: running.counted(HANDSHAKES))
        assert running.counted(HANDSHAKES) == {("test", "protocol_error", "false", ""): 1}
        assert running.counted(CLIENTS) == {("test", result): 1}
        assert not server.connections
    (record,) = (record for record in caplog.records if record.message == "handshake failed")
    assert record.reason == f"client certificate: {reason}"


async def test_the_log_names_the_certificate(caplog: Any) -> None:
    for logger in ("tlsproxy.handshake", "tlsproxy.access"):
        caplog.set_level(logging.INFO, logger)
    eve = ROOT.issue('eve"\n{"event": "forged"}')
    async with backend() as server, data_plane(server.port, client_verification=OPTIONAL) as running:
        for certificate in (eve, None):
            client = await connect(running, context_of(certificate))
            assert (await client.request(GET)).status == 200
    first, second = (record for record in caplog.records if record.message == "handshake")
    assert first.client_fingerprint == eve.fingerprint
    assert first.client_subject == 'CN=eve\\"\\0A{\\"event\\": \\"forged\\"}'
    assert not hasattr(second, "client_subject")
    first, second = (record for record in caplog.records if record.message == "request")
    assert first.client_subject == 'CN=eve\\"\\0A{\\"event\\": \\"forged\\"}'
    assert second.client_subject is None


@pytest.mark.parametrize("mode", ListenerMode)
async def test_the_proxy_protocol_tells_of_the_certificate(mode: ListenerMode) -> None:
    async def answer(connection: BackendConnection) -> None:
        await connection.exactly(16)  # the header's own, which begins with two line ends
        await connection.head()
        await connection.send(ok())

    async with (
        backend(answer) as server,
        data_plane(
            server.port,
            mode=mode,
            client_verification=OPTIONAL,
            upstream={"proxy_protocol": ProxyProtocol.V2, "keepalive": 0},
        ) as running,
    ):
        context = context_of(ALICE)
        session = None
        for used, shown, name in (
            (context, ClientShown.ON_THIS_CONNECTION, "alice"),
            (context, ClientShown.IN_THIS_SESSION, "alice"),
            (context_of(None), ClientShown.NEVER, None),
        ):
            client = await connect(running, used, session if used is context else None)
            host, port = client.writer.get_extra_info("sockname")
            assert (await client.request(GET)).status == 200
            session = client.tls.tls.session
            details = TlsDetails("TLSv1.3", "TLS_AES_128_GCM_SHA256", None, "localhost", shown, name)
            endpoints = Endpoints(Address(host, port), Address("127.0.0.1", running.port))
            assert v2_header(endpoints, details) in server.received


async def run_client(*arguments: str, stdin: bytes = b"") -> str:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    stdout, _ = await asyncio.wait_for(process.communicate(stdin), 30)
    return stdout.decode(errors="replace")


@pytest.mark.parametrize("version", VERSIONS)
async def test_openssl_and_gnutls_clients(tmp_path: Path, version: str) -> None:
    request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.root.public_bytes(Encoding.PEM))
    for name, certificate in (("alice", ALICE), ("mallory", REVOKED)):
        (tmp_path / name).write_bytes(certificate.pem())
    tls = {
        "TLSv1.2": ("-tls1_2", "NORMAL:-VERS-ALL:+VERS-TLS1.2"),
        "TLSv1.3": ("-tls1_3", "NORMAL:-VERS-ALL:+VERS-TLS1.3"),
    }
    flag, priority = tls[version]
    async with backend() as server, data_plane(server.port, client_verification=REQUIRED) as running:

        async def openssl(certificate: str) -> str:
            path = str(tmp_path / certificate)
            connect = f"127.0.0.1:{running.port}"
            arguments = ("-connect", connect, "-servername", "localhost", flag, "-ign_eof", "-CAfile")
            return await run_client(
                "openssl", "s_client", *arguments, str(tmp_path / "ca.pem"), "-cert", path, "-cert_chain", path,
                "-key", path, stdin=request,
            )  # fmt: skip

        async def gnutls(certificate: str) -> str:
            path = str(tmp_path / certificate)
            return await run_client(
                "gnutls-cli", "--port", str(running.port), "--priority", priority, "--x509cafile",
                str(tmp_path / "ca.pem"), "--x509certfile", path, "--x509keyfile", path, "localhost", stdin=request,
            )  # fmt: skip

        for client in (openssl, gnutls):
            assert "HTTP/1.1 200 OK" in await client("alice")
        assert "CN = client root" in (told := await openssl("mallory"))
        assert "certificate revoked" in told
        assert "revoked" in await gnutls("mallory")
        assert running.counted(CLIENTS) == {("test", "verified"): 2, ("test", "refused"): 2}
