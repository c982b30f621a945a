"""How a proxy worker ends: whoever it has accepted is served, even if that was in its very last moment."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hsm.messages import KeyType
from hsm.metricstore import MetricStore
from tests.dataplane import until
from tests.proxy import site_config
from tlsproxy.config_yaml import parse_config
from tlsproxy.serve.control import ProxyWorkerSpec
from tlsproxy.serve.worker import ORPHAN_DRAIN_S, Worker, wait_for_drain


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def redirecting_worker(directory: Path, listening: socket.socket) -> Worker:
    """A worker that needs neither token nor upstream: it redirects whoever comes to `listening`."""
    routes = [{"redirect": {"host": "localhost"}}]
    listeners = [{"address": "127.0.0.1:1", "tls": "off", "routes": routes}]
    settings = site_config(directory, {"www": KeyType.ECDSA_P256}, "127.0.0.1:1", listeners=listeners)
    config = parse_config(yaml.safe_dump(settings).encode(), "test.yaml", directory)
    return Worker(
        ProxyWorkerSpec(
            index=1,
            config=dataclasses.replace(config, certificates=()),
            chains={},
            client_authorities={},
            listener_fds=((os.dup(listening.fileno()),),),
            tokens=(),
            metrics_fd=MetricStore().fd,
            run_as=(),
            ticket_keys=(),
        )
    )


@pytest.mark.parametrize("steps", [0, 1, 2], ids=["waits", "accepted", "begun"])
async def test_a_client_that_comes_just_before_the_drain_is_served(
    tmp_path: Path, listening: socket.socket, steps: int
) -> None:
    """After one step of the loop the client has been accepted, but its protocol does not know so yet."""
    worker = redirecting_worker(tmp_path, listening)
    await worker.start()
    with socket.create_connection(listening.getsockname()) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        for _ in range(steps):
            await asyncio.sleep(0)
        await worker.drain(10)
        # At once: the process ends now.
        client.settimeout(0)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 308 ")


async def test_a_worker_ends_with_a_supervisor_that_was_killed_before_it_had_read_everything(
    tmp_path: Path, listening: socket.socket
) -> None:
    """Then the kernel resets the control connection, rather than ending it."""
    worker = redirecting_worker(tmp_path, listening)
    supervisor, control = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=control)
    with supervisor:
        writer.write(b"alive\n")
        await until(lambda: len(supervisor.recv(64, socket.MSG_PEEK | socket.MSG_DONTWAIT)) == 6)
    assert await asyncio.wait_for(wait_for_drain(worker, reader, bytearray(), 60), 10) == ORPHAN_DRAIN_S
    writer.close()
