"""Real clients against the whole product: each TLS version, each kind of key, each scheme a client can ask for."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from hsm.messages import KeyType
from tests.backends import backend
from tests.proxy import Proxy, free_port, make_site, running_proxy, site_config

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {
    "p256": KeyType.ECDSA_P256,
    "p384": KeyType.ECDSA_P384,
    "rsa2048": KeyType.RSA_2048,
    "rsa3072": KeyType.RSA_3072,
}
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    """One listener for each key: the first has all of them."""
    directory = tmp_path_factory.mktemp("clients")
    make_site(directory, KEYS)
    async with contextlib.AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(backend())
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}")
        config["listeners"] += [
            {**config["listeners"][0], "address": f"127.0.0.1:{free_port()}", "certificates": [label]} for label in KEYS
        ]
        yield await stack.enter_async_context(running_proxy(directory, config))


def port(proxy: Proxy, label: str) -> int:
    """The port of the listener that has only this key."""
    (address,) = [item["address"] for item in proxy.config["listeners"] if item["certificates"] == [label]]
    return int(address.rpartition(":")[2])


async def run(*command: str | Path, stdin: bytes = b"") -> str:
    """Run a client to its end; return what it wrote, stdout and stderr together."""
    process = await asyncio.create_subprocess_exec(
        *map(str, command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(stdin), 30)
    text = output.decode("utf-8", "replace")
    assert process.returncode == 0, text
    return text


@pytest.mark.parametrize(
    ("label", "version", "scheme", "shown"),
    [
        ("p256", "1_3", "ecdsa_secp256r1_sha256", ("ECDSA", "SHA256")),
        ("p384", "1_3", "ecdsa_secp384r1_sha384:ecdsa_secp256r1_sha256", ("ECDSA", "SHA384")),
        ("rsa2048", "1_3", "rsa_pss_rsae_sha256:ecdsa_secp256r1_sha256", ("RSA-PSS", "SHA256")),
        ("rsa3072", "1_3", "rsa_pss_rsae_sha384:ecdsa_secp256r1_sha256", ("RSA-PSS", "SHA384")),
        ("rsa2048", "1_3", "rsa_pss_rsae_sha512:ecdsa_secp256r1_sha256", ("RSA-PSS", "SHA512")),
        ("p256", "1_2", "ecdsa_secp256r1_sha256", ("ECDSA", "SHA256")),
        ("p384", "1_2", "ecdsa_secp384r1_sha384", ("ECDSA", "SHA384")),
        ("rsa2048", "1_2", "rsa_pss_rsae_sha256:ecdsa_secp256r1_sha256", ("RSA-PSS", "SHA256")),
        ("rsa2048", "1_2", "rsa_pkcs1_sha256:ecdsa_secp256r1_sha256", ("RSA", "SHA256")),
        ("rsa3072", "1_2", "rsa_pkcs1_sha384:ecdsa_secp256r1_sha256", ("RSA", "SHA384")),
        ("rsa2048", "1_2", "rsa_pkcs1_sha512:ecdsa_secp256r1_sha256", ("RSA", "SHA512")),
    ],
)
async def test_openssl(proxy: Proxy, label: str, version: str, scheme: str, shown: tuple[str, str]) -> None:
    output = await run(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{port(proxy, label)}", "-servername", "localhost"),
        *("-CAfile", proxy.directory / "ca.pem", "-verify_return_error", "-verify_hostname", "localhost"),
        *(f"-tls{version}", "-sigalgs", scheme, "-ign_eof"),
        stdin=REQUEST,
    )
    assert "hello" in output
    assert f"Peer signature type: {shown[0]}\n" in output
    assert f"Peer signing digest: {shown[1]}\n" in output


@pytest.mark.parametrize(
    ("label", "version", "scheme", "shown"),
    [
        ("p256", "TLS1.3", "SIGN-ECDSA-SECP256R1-SHA256", "ECDSA-SECP256R1-SHA256"),
        ("p384", "TLS1.3", "SIGN-ECDSA-SECP384R1-SHA384:+SIGN-ECDSA-SECP256R1-SHA256", "ECDSA-SECP384R1-SHA384"),
        ("rsa2048", "TLS1.3", "SIGN-RSA-PSS-RSAE-SHA256:+SIGN-ECDSA-SECP256R1-SHA256", "RSA-PSS-RSAE-SHA256"),
        ("p256", "TLS1.2", "SIGN-ECDSA-SHA256", "ECDSA-SHA256"),
        ("rsa2048", "TLS1.2", "SIGN-RSA-SHA256:+SIGN-ECDSA-SHA256", "RSA-SHA256"),
        ("rsa2048", "TLS1.2", "SIGN-RSA-PSS-RSAE-SHA256:+SIGN-ECDSA-SHA256", "RSA-PSS-RSAE-SHA256"),
    ],
)
async def test_gnutls(proxy: Proxy, label: str, version: str, scheme: str, shown: str) -> None:
    output = await run(
        *("gnutls-cli", "--x509cafile", proxy.directory / "ca.pem", "--port", str(port(proxy, label))),
        *("--sni-hostname", "localhost", "--verify-hostname", "localhost"),
        *("--priority", f"NORMAL:-VERS-ALL:+VERS-{version}:-SIGN-ALL:+{scheme}", "127.0.0.1"),
        stdin=REQUEST,
    )
    assert "hello" in output
    assert f"({shown})" in output


@pytest.mark.parametrize("label", ["p256", "rsa2048"])
@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_curl(proxy: Proxy, label: str, version: str) -> None:
    listener = port(proxy, label)
    output = await run(
        *("curl", "--silent", "--show-error", "--cacert", proxy.directory / "ca.pem", f"--tlsv{version}"),
        *("--tls-max", version, "--resolve", f"localhost:{listener}:127.0.0.1", f"https://localhost:{listener}/"),
    )
    assert output == "hello"


@pytest.mark.parametrize("label", list(KEYS))
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_python(proxy: Proxy, label: str, version: ssl.TLSVersion) -> None:
    context = proxy.client_context(minimum_version=version, maximum_version=version)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port(proxy, label), ssl=context, server_hostname="localhost"
    )
    writer.write(REQUEST)
    assert (await reader.read()).endswith(b"\r\n\r\nhello")
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    ("schemes", "shown"),
    [("ecdsa_secp256r1_sha256", "ECDSA"), ("rsa_pkcs1_sha256:rsa_pss_rsae_sha256", "RSA-PSS")],
)
async def test_a_client_gets_the_key_it_can_verify(proxy: Proxy, schemes: str, shown: str) -> None:
    output = await run(
        *("openssl", "s_client", "-connect", f"127.0.0.1:{proxy.port}", "-servername", "localhost"),
        *("-CAfile", proxy.directory / "ca.pem", "-sigalgs", schemes, "-ign_eof"),
        stdin=REQUEST,
    )
    assert f"Peer signature type: {shown}\n" in output
    assert "hello" in output


async def test_a_session_is_resumed_without_a_signature(proxy: Proxy, tmp_path: Path) -> None:
    session = tmp_path / "session"
    command = (
        *("openssl", "s_client", "-connect", f"127.0.0.1:{proxy.port}", "-servername", "localhost", "-ign_eof"),
        *("-CAfile", proxy.directory / "ca.pem"),
    )
    assert "New, TLSv1.3" in await run(*command, "-sess_out", session, stdin=REQUEST)
    signed = await proxy.metric("hsm_sign_requests_total")
    assert "Reused, TLSv1.3" in await run(*command, "-sess_in", session, stdin=REQUEST)
    assert await proxy.metric("hsm_sign_requests_total") == signed > 0
