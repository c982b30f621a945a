"""Another instance in the place of this one: by taking over, or by the service manager that holds the sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import socket
import ssl
import sys
from pathlib import Path

import pytest

from hsm.messages import KeyType
from tests.backends import backend
from tests.load import steady_load
from tests.proxy import TLSPROXY, Proxy, make_site, run_to_end, running_proxy, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


async def test_a_successor_takes_over_under_load_and_no_request_fails(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}", workers=2, log={"level": "warning"})
        async with running_proxy(tmp_path, config) as proxy:
            async with steady_load(proxy.port, proxy.client_context) as load:
                for _ in range(2):
                    old = proxy.process
                    proxy.process = await successor(tmp_path)
                    assert await old.wait() == 0
                    await load.until_answered(20)
                assert load.failures == []
            assert (await run_to_end("status", "--runtime-dir", str(tmp_path / "run")))[0] == 0
            assert (await proxy.admin("/readyz"))[0] == 200
            assert await proxy.stop() == 0
        assert not list((tmp_path / "run").rglob("*.sock"))


async def successor(directory: Path) -> asyncio.subprocess.Process:
    with (directory / "stderr").open("ab") as stderr:
        return await asyncio.create_subprocess_exec(
            *TLSPROXY, "run", "--take-over", "--config", str(directory / "proxy.yaml"), stderr=stderr
        )


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_ticket_made_before_a_take_over_resumes_after_it_and_after_the_next(
    tmp_path: Path, version: ssl.TLSVersion
) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        async with running_proxy(tmp_path, config) as proxy:
            context = proxy.client_context(minimum_version=version, maximum_version=version)
            first, resumed = await asyncio.to_thread(get_resuming, proxy.port, context, None)
            assert not resumed
            for _ in range(2):
                old = proxy.process
                proxy.process = await successor(tmp_path)
                assert await old.wait() == 0
                # In TLS 1.3 a ticket is for one connection, so that none can be told from another by it.
                first, resumed = await asyncio.to_thread(get_resuming, proxy.port, context, first)
                assert resumed
            assert await proxy.metric("tlsproxy_handshakes_total", resumed="true", result="ok") == 1
            assert await proxy.stop() == 0


def get_resuming(
    port: int, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[ssl.SSLSession | None, bool]:
    """GET over a new connection that offers `session`; return the session it then has, and whether it was resumed."""
    connection = http.client.HTTPSConnection("localhost", port, timeout=30, context=context)
    plain = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sock = tls = context.wrap_socket(plain, server_hostname="localhost", session=session)
    with contextlib.closing(connection):
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"hello"
        return tls.session, tls.session_reused is True


async def test_taking_over_needs_an_instance_that_runs(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    file = write_config(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9"))
    code, _, stderr = await run_to_end("run", "--take-over", "--config", str(file))
    assert code == 1
    assert f"tlsproxy: {tmp_path}/run/control.sock: expected a running tlsproxy" in stderr


class Notifications:
    """Stands for the service manager: its socket, and what has come there."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(self.path))
        self.received: list[str] = []

    def __call__(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.received.append(self._socket.recv(4096).decode())
        return self.received

    def close(self) -> None:
        self._socket.close()


async def test_the_service_manager_is_told_and_its_sockets_are_used(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    async with backend() as upstream, contextlib.AsyncExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        notifications = stack.enter_context(contextlib.closing(Notifications(tmp_path)))
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}", workers=2)
        config["listeners"][0]["address"] = f"127.0.0.1:{listening.getsockname()[1]}"
        file = write_config(tmp_path, config)
        for _ in range(2):  # it may be restarted: a client that comes meanwhile waits
            process = await activated(listening, notifications.path, file, tmp_path)
            proxy = Proxy(tmp_path, config, process)
            request = asyncio.create_task(proxy.get())
            ready = f"READY=1\nMAINPID={process.pid}"
            await proxy.until(lambda told=ready: told in notifications(), "told that it is ready")
            assert await request == (200, b"hello")
            await proxy.until(lambda: "WATCHDOG=1" in notifications(), "told that it is alive")
            assert (await run_to_end("reload", "--runtime-dir", str(tmp_path / "run")))[0] == 0
            assert any(state.startswith("RELOADING=1\nMONOTONIC_USEC=") for state in notifications())
            assert await proxy.get() == (200, b"hello")
            assert await proxy.stop() == 0
            assert "STOPPING=1" in notifications()
            notifications.received.clear()


async def activated(listening: socket.socket, notify: Path, file: Path, directory: Path) -> asyncio.subprocess.Process:
    """Start the proxy as systemd does: with the socket as descriptor 3, and LISTEN_PID its own process id."""
    start = (
        f"import os; os.dup2({listening.fileno()}, 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
        f"os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'tlsproxy', 'run', '--config', {str(file)!r}])"
    )
    environment = os.environ | {"LISTEN_FDS": "1", "NOTIFY_SOCKET": str(notify), "WATCHDOG_USEC": "2000000"}
    with (directory / "stderr").open("ab") as stderr:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", start, pass_fds=[listening.fileno()], env=environment, stderr=stderr
        )
