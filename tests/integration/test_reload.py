"""`tlsproxy reload` and SIGHUP: everything can change while clients are served; nothing does if anything is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cryptography import x509

from hsm.keys import generate_private_key, public_key_der
from hsm.messages import KeyType
from hsm.pki import make_demo_ca
from hsm.vault import Vault
from tests.backends import backend
from tests.load import steady_load
from tests.proxy import Proxy, free_port, log_events, make_site, run_to_end, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


@contextlib.asynccontextmanager
async def site(directory: Path, **changes: Any) -> AsyncIterator[Proxy]:
    make_site(directory, KEYS)
    async with backend() as upstream:
        quiet = {"log": {"level": "warning"}}
        config = site_config(directory, KEYS, f"127.0.0.1:{upstream.port}", **{**quiet, **changes})
        async with running_proxy(directory, config) as proxy:
            yield proxy


async def reload(proxy: Proxy, config: dict[str, Any] | None = None) -> tuple[int, str]:
    """Put a configuration in place and reload; return exit code and stderr."""
    if config is not None:
        write_config(proxy.directory, config)
    code, _, stderr = await run_to_end("reload", "--runtime-dir", str(proxy.directory / "run"))
    return code, stderr


async def test_twenty_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    async with site(tmp_path, workers=2) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        hsm_workers = proxy.hsm_workers
        before = set(proxy.proxy_workers)
        for count in range(1, 21):
            proxy.process.send_signal(signal.SIGHUP)
            await proxy.until(lambda done=count: reloads(proxy, done), f"reload {count}")
        await load.until_answered(20)
        assert load.failures == []
        assert proxy.hsm_workers == hsm_workers
        await proxy.until(lambda: len(proxy.proxy_workers) == 2, "the old workers gone")
        assert not before & set(proxy.proxy_workers)
        handshakes = await proxy.metric("tlsproxy_handshakes_total", result="ok")
        assert handshakes >= load.connections - 4


async def reloads(proxy: Proxy, count: int, result: str = "success") -> bool:
    return await proxy.metric("tlsproxy_config_reloads_total", result=result) == count


async def test_a_new_key_and_certificate_come_into_force_under_load(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        before = await served_certificate(proxy)
        ca = make_demo_ca()
        key = generate_private_key(KeyType.ECDSA_P256)
        await asyncio.to_thread(add_key, tmp_path, "www-2", key)
        (tmp_path / "www-2.pem").write_bytes(ca.issue_leaf(public_key_der(key.public_key()), ["localhost"], []))
        load.context.load_verify_locations(cadata=ca.certificate_pem().decode())
        rotated = dict(proxy.config) | {
            "certificates": [{"name": "www", "chain_file": "www-2.pem", "key": "www-2"}],
        }
        assert await reload(proxy, rotated) == (0, "")
        after = await served_certificate(proxy)
        assert after != before
        assert after == ssl.PEM_cert_to_DER_cert(first_certificate(tmp_path / "www-2.pem"))
        await load.until_answered(20)
        assert load.failures == []


def add_key(directory: Path, label: str, key: Any) -> None:
    pin = bytearray((directory / "token.pin").read_bytes().strip())
    Vault.open(str(directory / "token"), pin).add(label, key)


def first_certificate(path: Path) -> str:
    return path.read_text().partition("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"


async def served_certificate(proxy: Proxy) -> bytes:
    context = proxy.client_context(check_hostname=False, verify_mode=ssl.CERT_NONE)
    _, writer = await asyncio.open_connection("127.0.0.1", proxy.port, ssl=context)
    certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return certificate


async def test_a_certificate_that_is_renewed_on_disk_comes_into_force_by_itself(tmp_path: Path) -> None:
    async with site(tmp_path, watch_certificates=True) as proxy:
        before = await served_certificate(proxy)
        chain = tmp_path / "www.pem"
        key = x509.load_pem_x509_certificate(chain.read_bytes()).public_key()
        renewed = make_demo_ca().issue_leaf(public_key_der(key), ["localhost"], [])
        (tmp_path / "www.pem.new").write_bytes(renewed)
        (tmp_path / "www.pem.new").rename(chain)
        await proxy.until(lambda: reloads(proxy, 1), "a reload")
        after = await served_certificate(proxy)
        assert before != after == ssl.PEM_cert_to_DER_cert(first_certificate(chain))

        make_site_of_another_key(tmp_path)
        (tmp_path / "other.pem").rename(chain)
        await proxy.until(lambda: reloads(proxy, 1, "failure"), "a reload that fails")
        assert await served_certificate(proxy) == after


async def test_what_is_wrong_is_told_and_the_old_state_serves_on(tmp_path: Path) -> None:
    async with site(tmp_path) as proxy:
        workers = [*proxy.proxy_workers, *proxy.hsm_workers]
        file = tmp_path / "proxy.yaml"

        code, stderr = await reload(proxy, dict(proxy.config) | {"workers": "many"})
        assert code == 2
        assert stderr.startswith(f"{file}:1:10: workers: expected ")

        make_site_of_another_key(tmp_path)
        mismatched = dict(proxy.config) | {"certificates": [{"name": "www", "chain_file": "other.pem", "key": "www"}]}
        code, stderr = await reload(proxy, mismatched)
        assert code == 2
        assert "certificates[0].key: expected the key of " in stderr

        tokens = [
            *proxy.config["hsm"]["tokens"],
            {"name": "b", "kind": "soft", "path": "gone", "pin_file": "token.pin"},
        ]
        code, stderr = await reload(proxy, dict(proxy.config) | {"hsm": {"tokens": tokens}})
        assert code == 2
        assert "hsm.tokens[1].path: expected a token that opens" in stderr

        listeners = [*proxy.config["listeners"], dict(proxy.config["listeners"][0]) | {"address": "192.0.2.1:443"}]
        code, stderr = await reload(proxy, dict(proxy.config) | {"listeners": listeners})
        assert (code, stderr.count("\n")) == (1, 1)
        assert "cannot listen on 192.0.2.1:443" in stderr

        code, stderr = await reload(proxy, dict(proxy.config) | {"runtime_dir": str(tmp_path / "elsewhere")})
        assert (code, stderr.count("\n")) == (1, 1)
        assert "runtime_dir: " in stderr

        assert [*proxy.proxy_workers, *proxy.hsm_workers] == workers
        assert await proxy.get() == (200, b"hello")
        assert await proxy.metric("tlsproxy_config_reloads_total", result="failure") == 5
        assert sum(event["event"].startswith("reload failed") for event in log_events(proxy.log)) >= 5


def make_site_of_another_key(directory: Path) -> None:
    key = generate_private_key(KeyType.ECDSA_P256)
    chain = make_demo_ca().issue_leaf(public_key_der(key.public_key()), ["localhost"], [])
    (directory / "other.pem").write_bytes(chain)


async def test_listeners_workers_and_the_admin_port_can_change(tmp_path: Path) -> None:
    async with site(tmp_path, workers=3) as proxy, steady_load(proxy.port, proxy.client_context) as load:
        second = free_port()
        changed = dict(proxy.config) | {
            "workers": 1,
            "listeners": [
                *proxy.config["listeners"],
                dict(proxy.config["listeners"][0]) | {"address": f"127.0.0.1:{second}"},
            ],
            "admin": {"address": f"127.0.0.1:{free_port()}"},
        }
        before = await proxy.metric("tlsproxy_http_requests_total")
        assert await reload(proxy, changed) == (0, "")
        await load.until_answered(50)
        assert load.failures == []
        other = Proxy(tmp_path, changed, proxy.process)
        assert await other.metric("tlsproxy_http_requests_total") >= before + 50
        other.port = second
        assert await other.get() == (200, b"hello")
        proxy.admin_port = other.admin_port
        await proxy.until(lambda: len(proxy.proxy_workers) == 1, "the old workers gone")

        assert await reload(proxy, dict(proxy.config) | {"workers": 2}) == (0, "")
        await load.until_answered(20)
        assert load.failures == []
        await other.until(lambda: refuses(second), "the second listener gone")


async def refuses(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return True
    writer.close()
    return False


async def test_commands_need_a_running_proxy(tmp_path: Path) -> None:
    (tmp_path / "proxy.yaml").write_text(f"runtime_dir: {tmp_path}\nthe_rest: is not asked for\n")
    code, stdout, stderr = await run_to_end("reload", "--config", str(tmp_path / "proxy.yaml"))
    assert (code, stdout) == (1, "")
    assert stderr == f"tlsproxy: {tmp_path}/control.sock: expected a running tlsproxy; found none\n"
