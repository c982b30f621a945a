"""What every server under measurement has in common: how it is started, found ready, charged with CPU time, ended."""

from __future__ import annotations

import abc
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm import pki
from hsm.messages import KeyType
from perf import cpu
from perf.clients import client_context
from perf.setups.slow_hsm import SlowHsm
from tests.proxy import free_port

if TYPE_CHECKING:
    from typing_extensions import Self

PROXY_ROLE = "proxy"
"""The processes that speak TLS. Peers that sign in the same process have no other."""
GROUPS = "X25519:prime256v1:secp384r1"
"""Key exchange groups, the same for every server: this proxy's."""


class Server(Protocol):
    """Something to measure: where it is, what to trust, and what CPU time it has used."""

    @property
    def name(self) -> str:
        """As in the tables."""

    @property
    def host(self) -> str:
        """IP address or name to connect to."""

    @property
    def port(self) -> int:
        """TCP port."""

    @property
    def server_name(self) -> str:
        """SNI, the name the certificate must have, and Host."""

    @property
    def ca_file(self) -> Path:
        """The CA that a client trusts, PEM."""

    def pids_by_role(self) -> dict[int, str]:
        """The live processes; none if they are not known."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, its certificate chain and the CA that a client trusts, as files."""

    key_type: KeyType
    key_file: Path
    chain_file: Path
    combined_file: Path
    """Chain and key in one file, as HAProxy and hitch want it."""
    ca_file: Path


def make_credential(directory: Path, key_type: KeyType) -> Credential:
    """Make a CA, a key and a certificate for `localhost` in the directory."""
    directory.mkdir(parents=True)
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if key_type.is_rsa:
        key = rsa.generate_private_key(65537, int(key_type.value.removeprefix("rsa-")))
    else:
        key = ec.generate_private_key(ec.SECP256R1() if key_type is KeyType.ECDSA_P256 else ec.SECP384R1())
    public_key = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    ca = pki.make_demo_ca("perf CA")
    chain_pem = ca.issue_leaf(public_key, ["localhost"], ["127.0.0.1"])
    names = ("key.pem", "chain.pem", "combined.pem", "ca.pem")
    credential = Credential(key_type, *(directory / name for name in names))
    for path, content in (
        (credential.key_file, key_pem),
        (credential.chain_file, chain_pem),
        (credential.combined_file, chain_pem + key_pem),
        (credential.ca_file, ca.certificate_pem()),
    ):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return credential


@dataclass(frozen=True, slots=True)
class Site:
    """What all servers of one run share."""

    directory: Path
    credential: Credential
    backend_port: int
    """Where a plain HTTP back end answers `/` with 100 bytes, `/bulk` with 10 MB, and reads what is sent to `/sink`."""
    hsms: Sequence[SlowHsm]
    """Tokens with the key as `perf`; empty if no server of the run needs one."""
    workers: int
    """Worker processes (or threads) of each server."""
    sessions: int
    """PKCS#11 sessions of this proxy with each token. The peers open what they like."""


class Setup(abc.ABC):
    """A server that is started for the run: a context manager around its process. Satisfies Server."""

    name: str
    needs_hsm = False

    host = "127.0.0.1"
    server_name = "localhost"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.directory = site.directory / self.name
        self.port = free_port()
        self.ca_file = site.credential.ca_file
        self._process: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write the configuration; return the command and what to add to its environment."""

    def role(self, command_line: str) -> str:  # noqa: ARG002
        """What the process with this command line does: `proxy`, or another name for CPU that is shown apart."""
        return PROXY_ROLE

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True)
        command, environment = self.prepare()
        log_path = self.directory / "log"
        with log_path.open("wb") as log:
            try:
                # A session of its own: Ctrl-C ends the run, and the run ends its servers.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | environment,
                    start_new_session=True,
                )
            except FileNotFoundError:
                raise RuntimeError(f"{self.name} needs {command[0]}: see perf/system-packages.txt") from None
        try:
            self._wait_until_serving(self._process, log_path)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def pids_by_role(self) -> dict[int, str]:
        """See Server."""
        assert self._process is not None
        return {pid: self.role(cpu.command_line(pid)) for pid in cpu.descendants(self._process.pid)}

    def _check(self, connection: socket.socket) -> None:
        """Raise OSError unless the server behind the connection is ready."""
        client_context(self.ca_file).wrap_socket(connection, server_hostname=self.server_name).close()

    def _wait_until_serving(self, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 30.0) -> None:
        give_up_at = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at:
            if process.poll() is not None:
                end = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} ended with exit status {process.returncode}:\n{end}")
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.host, self.port), timeout=1) as connection,
            ):
                self._check(connection)
                return
            time.sleep(0.05)
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.name} does not serve on port {self.port} after {timeout_s:g} s:\n{end}")
