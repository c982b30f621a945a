"""Soft tokens, workers of them, and bytes that a TLS server has signed, for tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsm.keys import PrivateKey, generate_private_key
from hsm.messages import Hello, KeyType, SignReply, SignRequest, decode_hello, decode_replies, encode_request
from hsm.vault import Vault
from hsm.workerspec import WorkerSpec

PIN = "correct horse"
CERTIFICATE_VERIFY = b" " * 64 + b"TLS 1.3, server CertificateVerify\x00" + bytes(range(32))
"""TLS 1.3: what a server signs when the transcript hash is SHA-256."""
SERVER_KEY_EXCHANGE = b"c" * 32 + b"s" * 32 + b"\x03\x00\x1d\x20" + b"x" * 32
"""TLS 1.2: what a server signs, with an X25519 share."""


@functools.cache
def private_key(key_type: KeyType, name: str = "") -> PrivateKey:
    """Return a key, the same for the same arguments: making an RSA key takes a good part of a second."""
    return generate_private_key(key_type)


@dataclass(frozen=True, slots=True)
class SoftTokenFiles:
    """A soft token on disk and, for tests only, its private keys by label."""

    path: Path
    pin_file: Path
    private_keys: Mapping[str, PrivateKey]


def make_soft_token(directory: Path, keys: Mapping[str, KeyType] | None = None, name: str = "token") -> SoftTokenFiles:
    """Make a token in `directory`, by default with one P-256 key `www`. Its keys come from `private_key`."""
    files = SoftTokenFiles(
        directory / name,
        directory / f"{name}.pin",
        {label: private_key(kind, label) for label, kind in (keys or {"www": KeyType.ECDSA_P256}).items()},
    )
    files.pin_file.touch(mode=0o600)
    files.pin_file.write_text(PIN + "\n")
    vault = Vault.create(str(files.path), PIN.encode())
    for label, key in files.private_keys.items():
        vault.add(label, key)
    return files


class WorkerProcess:
    """A real `python -m hsm.worker`. It is ready or has failed when the constructor returns: `status` says which."""

    def __init__(self, directory: Path, inherited_fds: Sequence[int] = (), **fields: Any) -> None:
        """Start it with a WorkerSpec of `fields`; its socket is `directory`/worker.sock."""
        self.socket_path = directory / "worker.sock"
        self.socket_path.unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(self.socket_path))
            listener.listen()
            self.parent_end, child_end = socket.socketpair()
            stack.enter_context(child_end)
            reader, writer = os.pipe()
            stack.callback(os.close, writer)
            common: dict[str, Any] = {
                "token": "t",
                "listen_fd": listener.fileno(),
                "status_fd": writer,
                "allowed_uid": os.getuid(),
            }
            spec = WorkerSpec(**common | fields)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hsm.worker", str(child_end.fileno())],
                pass_fds=[child_end.fileno(), listener.fileno(), writer, *inherited_fds],
                stderr=subprocess.PIPE,
            )
            self.parent_end.sendall(spec.to_json().encode() + b"\n")
        with os.fdopen(reader) as statuses:
            self.status: dict[str, Any] = {"state": "opening"}
            while self.status["state"] == "opening":
                self.status = json.loads(statuses.readline())
        self._log = b""

    def stop(self) -> tuple[int, str]:
        """End it with SIGTERM; return its exit code and what it logged."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it logged. Again is no error."""
        assert self.process.stderr is not None
        if not self.process.stderr.closed:
            self._log = self.process.communicate(timeout=30)[1]
            self.parent_end.close()
        return self.process.returncode, self._log.decode()


@contextlib.contextmanager
def soft_worker(directory: Path, files: SoftTokenFiles, **fields: Any) -> Iterator[WorkerProcess]:
    """Run a real worker of the token while the context lasts."""
    worker = WorkerProcess(directory, kind="soft", path=str(files.path), pin_file=str(files.pin_file), **fields)
    try:
        yield worker
    finally:
        worker.stop()


class WorkerClient:
    """A blocking client of one worker."""

    def __init__(self, socket_path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self._buffer = b""
        try:
            self.socket.connect(str(socket_path))
            self.hello = self._receive_hello()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> WorkerClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, *requests: SignRequest) -> list[SignReply]:
        """Send requests at once and return their replies, in the order of arrival."""
        self.socket.sendall(b"".join(map(encode_request, requests)))
        return self.receive(len(requests))

    def receive(self, count: int) -> list[SignReply]:
        """Return the next `count` replies. Raises EOFError when the worker closed the connection."""
        replies: list[SignReply] = []
        while len(replies) < count:
            self._read_more()
            more, used = decode_replies(self._buffer)
            self._buffer = self._buffer[used:]
            replies += more
        return replies

    def _receive_hello(self) -> Hello:
        while (decoded := decode_hello(self._buffer)) is None:
            self._read_more()
        hello, used = decoded
        self._buffer = self._buffer[used:]
        return hello

    def _read_more(self) -> None:
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError
        self._buffer += data


def deadline_in(seconds: float) -> int:
    """Return a request's deadline, that long from now."""
    return time.monotonic_ns() + int(seconds * 1e9)
