"""The whole product from a configuration file, with what is said of routes and upstreams there."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import ssl
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsm.keys import public_key_der
from hsm.messages import KeyType
from hsm.pki import make_demo_ca
from tests.backends import Backend, always, backend, ok
from tests.proxy import free_port, make_site, running_proxy, site_config
from tests.tokens import private_key

KEYS = {"www": KeyType.ECDSA_P256}


def tls_server(directory: Path) -> ssl.SSLContext:
    """Return the context of a server for `inside.test`; its CA is `upstream-ca.pem`."""
    ca = make_demo_ca()
    key = private_key(KeyType.ECDSA_P256, "upstream")
    (directory / "upstream-ca.pem").write_bytes(ca.certificate_pem())
    chain = directory / "upstream.pem"
    chain.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        + ca.issue_leaf(public_key_der(key.public_key()), ["inside.test"], [])
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)
    return context


def configuration(directory: Path, good: Backend, plain_port: int) -> dict[str, Any]:
    config = site_config(directory, KEYS, f"localhost:{good.port}")
    config["listeners"][0]["routes"] = [
        {
            "upstream": "app",
            "hsts": {"max_age": "1d"},
            "response_headers": {"set": {"Server": "edge"}},
        }
    ]
    config["listeners"].append(
        {"address": f"127.0.0.1:{plain_port}", "tls": "off", "routes": [{"redirect": {"host": "localhost"}}]}
    )
    config["upstreams"][0] |= {
        "servers": [{"address": f"localhost:{good.port}"}, {"address": f"127.0.0.1:{free_port()}"}],
        "tls": {"ca_file": "upstream-ca.pem", "server_name": "inside.test"},
        "health": {"path": "/healthz", "interval": "100ms", "fall": 1, "rise": 1},
    }
    return config


def fetch(port: int, path: str, context: ssl.SSLContext | None) -> tuple[int, dict[str, str], bytes]:
    connection: http.client.HTTPConnection
    if context is None:
        connection = http.client.HTTPConnection("localhost", port, timeout=30)
    else:
        connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=context)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


async def test_redirect_header_rules_tls_to_named_servers_and_health(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    plain_port = free_port()
    async with backend(always(ok(b"inside")), tls=tls_server(tmp_path)) as good:
        config = configuration(tmp_path, good, plain_port)
        async with running_proxy(tmp_path, config) as proxy:
            status, fields, _ = await asyncio.to_thread(fetch, plain_port, "/a?b", None)
            assert (status, fields["Location"]) == (308, "https://localhost/a?b")

            dead = config["upstreams"][0]["servers"][1]["address"]

            async def dead_is_known() -> bool:
                up = await proxy.metric("tlsproxy_upstream_server_up", upstream="app")
                return up == 1 and await proxy.metric("tlsproxy_upstream_server_up", server=dead) == 0

            await proxy.until(dead_is_known, "the server that is down known as such")
            for _ in range(4):
                status, fields, body = await asyncio.to_thread(fetch, proxy.port, "/", proxy.client_context())
                assert (status, body, fields["Server"]) == (200, b"inside", "edge")
                assert fields["Strict-Transport-Security"] == "max-age=86400"
            assert await proxy.metric("tlsproxy_upstream_errors_total") == 0
            assert b"GET /healthz HTTP/1.1\r\nHost: localhost:%d\r\n" % good.port in good.received
        assert '"event": "server is down"' in proxy.log
