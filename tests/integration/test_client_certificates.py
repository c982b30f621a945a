"""`tlsproxy run` with clients' certificates: whom a change of CAs or CRL lets in and keeps out, tickets included."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.client_cas import DAY, HOUR, NOW, ClientCa, IssuedClient
from tests.integration.test_reload import reload, reloads
from tests.proxy import Proxy, free_port, log_events, make_site, run_to_end, running_proxy, site_config

KEYS = {"www": KeyType.ECDSA_P256}
ROOT, NEW_ROOT = ClientCa(), ClientCa("new root")
ALICE, BOB = ROOT.issue(), ROOT.issue("bob")
NEXT_UPDATE = "tlsproxy_client_crl_next_update_timestamp_seconds"


@contextlib.asynccontextmanager
async def site(directory: Path, clients: dict[str, Any], **changes: Any) -> AsyncIterator[Proxy]:
    """Run a proxy whose first listener verifies its clients, and whose second does not."""
    make_site(directory, KEYS)
    async with backend() as upstream:
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", **changes)
        for_all = dict(config["listeners"][0]) | {"address": f"127.0.0.1:{free_port()}"}
        config["listeners"][0]["tls"] = {"client_certificates": {"ca_file": "clients.pem", **clients}}
        config["listeners"].append(for_all)
        async with running_proxy(directory, config) as proxy:
            yield proxy


class Someone:
    """A client that comes again with its ticket."""

    def __init__(self, proxy: Proxy, certificate: IssuedClient | None, version: str = "TLSv1.3") -> None:
        self.context = proxy.client_context(maximum_version=ssl.TLSVersion[version.replace(".", "_")])
        if certificate is not None:
            certificate.used_by(self.context)
        self.session: ssl.SSLSession | None = None

    async def gets(self, port: int) -> tuple[int, bool]:
        """GET over a new connection; return status, and whether the session was resumed. Raises OSError."""
        return await asyncio.to_thread(self._get, port)

    def _get(self, port: int) -> tuple[int, bool]:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as plain:
            sock = self.context.wrap_socket(plain, server_hostname="localhost", session=self.session)
            with contextlib.closing(http.client.HTTPConnection("localhost")) as connection:
                connection.sock = sock
                connection.request("GET", "/")
                status = connection.getresponse().status
                self.session = sock.session
                return status, bool(sock.session_reused)


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_who_is_revoked_is_out_with_the_reload_ticket_or_not(tmp_path: Path, version: str) -> None:
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    (tmp_path / "crl.pem").write_bytes(ROOT.crl())
    async with site(tmp_path, {"crl_file": "crl.pem"}) as proxy:
        alice, bob = Someone(proxy, ALICE, version), Someone(proxy, BOB, version)
        for client in (alice, bob):
            assert [await client.gets(proxy.port) for _ in range(2)] == [(200, False), (200, True)]
        assert await reload(proxy) == (0, "")
        assert await bob.gets(proxy.port) == (200, True)

        (tmp_path / "crl.pem").write_bytes(ROOT.crl(ALICE))
        assert await reload(proxy) == (0, "")
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.revoked"):
            await alice.gets(proxy.port)
        assert [await bob.gets(proxy.port) for _ in range(2)] == [(200, False), (200, True)]
        refused = [event for event in log_events(proxy.log) if event["event"] == "handshake failed"]
        assert [event["reason"] for event in refused] == ["client certificate: certificate revoked"]
        assert await proxy.metric("tlsproxy_client_certificates_total", result="refused") == 1


async def test_a_ca_that_is_taken_away_takes_its_clients_with_it(tmp_path: Path) -> None:
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    async with site(tmp_path, {}) as proxy:
        alice, newcomer = Someone(proxy, ALICE), Someone(proxy, NEW_ROOT.issue("carol"))
        assert await alice.gets(proxy.port) == (200, False)
        with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
            await newcomer.gets(proxy.port)
        (tmp_path / "clients.pem").write_bytes(ROOT.pem() + NEW_ROOT.pem())
        assert await reload(proxy) == (0, "")
        assert await newcomer.gets(proxy.port) == (200, False)
        assert [await alice.gets(proxy.port) for _ in range(2)] == [(200, False), (200, True)]
        (tmp_path / "clients.pem").write_bytes(NEW_ROOT.pem())
        assert await reload(proxy) == (0, "")
        with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
            await alice.gets(proxy.port)


async def test_a_ticket_of_another_listener_lets_nobody_in(tmp_path: Path) -> None:
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    async with site(tmp_path, {}) as proxy:
        nobody = Someone(proxy, None)
        for_all = int(proxy.config["listeners"][1]["address"].rpartition(":")[2])
        assert [await nobody.gets(for_all) for _ in range(2)] == [(200, False), (200, True)]
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
            await nobody.gets(proxy.port)


async def test_a_new_crl_comes_into_force_by_itself(tmp_path: Path) -> None:
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    crl = tmp_path / "crl.pem"
    crl.write_bytes(ROOT.crl())
    async with site(tmp_path, {"crl_file": "crl.pem"}, watch_certificates=True) as proxy:
        alice = Someone(proxy, ALICE)
        assert await alice.gets(proxy.port) == (200, False)
        before = await proxy.metric(NEXT_UPDATE, listener=f"127.0.0.1:{proxy.port}")
        (tmp_path / "new").write_bytes(ROOT.crl(ALICE, next_update=NOW + 2 * DAY))
        (tmp_path / "new").rename(crl)
        await proxy.until(lambda: reloads(proxy, 1), "a reload")
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.revoked"):
            await alice.gets(proxy.port)
        assert await proxy.metric(NEXT_UPDATE, listener=f"127.0.0.1:{proxy.port}") - before == DAY.total_seconds()

        (tmp_path / "new").write_bytes(NEW_ROOT.crl())
        (tmp_path / "new").rename(crl)
        await proxy.until(lambda: reloads(proxy, 1, "failure"), "a reload that fails")
        assert "CRLs that CAs in ca_file have signed expected; got one of CN=new root" in proxy.log
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.revoked"):
            await alice.gets(proxy.port)


async def test_a_crl_that_has_expired_refuses_clients_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "clients.pem").write_bytes(ROOT.pem())
    (tmp_path / "crl.pem").write_bytes(ROOT.crl(next_update=NOW - HOUR / 2))
    async with site(tmp_path, {"crl_file": "crl.pem", "verify": "optional"}) as proxy:
        alice, nobody = Someone(proxy, ALICE), Someone(proxy, None)
        with pytest.raises(ssl.SSLError, match=r"(?i)certificate.expired"):
            await alice.gets(proxy.port)
        assert await nobody.gets(proxy.port) == (200, False)
        listener = f"127.0.0.1:{proxy.port}"
        (told,) = (event for event in log_events(proxy.log) if event["event"].startswith("a CRL is not valid now"))
        assert (told["level"], told["listener"]) == ("error", listener)
        (refused,) = (event for event in log_events(proxy.log) if event["event"] == "handshake failed")
        assert refused["reason"] == "client certificate: CRL has expired"
        assert await proxy.metric(NEXT_UPDATE, listener=listener) < NOW.timestamp()
        code, _, stderr = await run_to_end("check", str(tmp_path / "proxy.yaml"))
        assert (code, stderr.count("\n")) == (2, 1)
        assert "listeners[0].tls.client_certificates.crl_file: " in stderr
        assert "expected CRLs that are valid now, as clients are refused otherwise; got some from " in stderr
