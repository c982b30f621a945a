from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from time import monotonic_ns

import pytest

from hsm.backends.base import Backend, Signer
from hsm.errors import TokenError
from hsm.messages import KeyInfo, SignatureScheme
from hsm.metricstore import MetricStore
from hsm.serving_threaded import _Server
from hsm.workerspec import WorkerSpec

HANG_LIMIT_NS = 100_000_000


class Slow(Signer):
    def sign(self, key: int, scheme: SignatureScheme, tbs: bytes) -> bytes:
        raise AssertionError


class SlowToken(Backend):
    @property
    def keys(self) -> tuple[KeyInfo, ...]:
        return ()

    @property
    def signers(self) -> Sequence[Signer]:
        return (Slow(), Slow())

    def close(self) -> None:
        raise AssertionError


def test_a_signature_hangs_when_it_is_found_to_twice(tmp_path: Path) -> None:
    """A process that was stopped itself sees the time that has passed before it sees the signature."""
    status_reader, status_writer = os.pipe()
    store = MetricStore()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        spec = WorkerSpec(
            token="t",
            listen_fd=listener.fileno(),
            status_fd=status_writer,
            allowed_uid=os.getuid(),
            kind="awskms",
            region="eu-central-1",
            hang_limit_s=0.1,
        )
        server = _Server(SlowToken(), listener, spec, store, ())
        now_ns = monotonic_ns()
        _, thread = server._threads
        thread.since_ns = now_ns - HANG_LIMIT_NS - 1
        server._check_health(now_ns)
        thread.since_ns = 0
        server._check_health(now_ns)
        thread.since_ns = now_ns - HANG_LIMIT_NS - 1
        server._check_health(now_ns)
        with pytest.raises(TokenError, match=r"HUNG: a signature has not returned for 0\.1 s"):
            server._check_health(now_ns)
        server._clients.close()
    os.close(server._failure_fd)
    os.close(status_reader)
    os.close(status_writer)
    store.close()
