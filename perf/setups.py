"""TLS servers that a run can start for itself: this proxy and its peers, each in a directory of its own.

Every setup serves one certificate for `localhost` on a free loopback port, with as many workers as asked, and tells
its processes by role so that CPU time can be charged to the part that used it.
"""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from hsm import pki
from hsm.messages import KeyType
from perf import cpu
from perf.load import client_context
from tests.fault_module import FaultModule
from tests.softhsm import MODULE as SOFTHSM_MODULE
from tests.softhsm import SoftHsm

if TYPE_CHECKING:
    from typing_extensions import Self

PIN = "perf-pin-1234"


def free_port() -> int:
    """A loopback TCP port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_serving(
    port: int, ca_file: Path | None, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 30.0
) -> None:
    """Return once something accepts on the port and, with `ca_file`, completes a TLS handshake.

    Raises RuntimeError with the log's end if the process ends first, or nothing serves in time.
    """
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            if ca_file is not None:
                client_context(ca_file).wrap_socket(connection, server_hostname="localhost").close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing serves on port {port} after {timeout_s:g} s:\n{log.read_text()[-2000:]}")


@dataclass(frozen=True, slots=True)
class Credential:
    """A key, its certificate chain and the CA that a client trusts, as files."""

    key_type: KeyType
    key_file: Path
    chain_file: Path
    ca_file: Path


def make_credential(directory: Path, key_type: KeyType) -> Credential:
    """Make a CA, a key and a certificate for `localhost` in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    if key_type.is_rsa:
        key = rsa.generate_private_key(65537, int(key_type.value.removeprefix("rsa-")))
    else:
        key = ec.generate_private_key(ec.SECP256R1() if key_type is KeyType.ECDSA_P256 else ec.SECP384R1())
    public_key = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    ca = pki.make_demo_ca("perf CA")
    credential = Credential(key_type, directory / "key.pem", directory / "chain.pem", directory / "ca.pem")
    credential.key_file.touch(mode=0o600)
    credential.key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    credential.chain_file.write_bytes(ca.issue_leaf(public_key, ["localhost"], ["127.0.0.1"]))
    credential.ca_file.write_bytes(ca.certificate_pem())
    return credential


class Setup(abc.ABC):
    """A server under measurement: a context manager around its process."""

    name: str

    def __init__(self, directory: Path, credential: Credential, workers: int, port: int = 0) -> None:
        self.directory = directory
        self.credential = credential
        self.workers = workers
        self.port = port or free_port()
        self.log = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write the configuration; return the command and what to add to its environment."""

    def trusted_ca(self) -> Path | None:
        """What a client trusts; None if this server speaks no TLS."""
        return self.credential.ca_file

    @abc.abstractmethod
    def role(self, command_line: str) -> str:
        """What the process with this command line does: `proxy`, `hsm`, or `` for one that serves nothing."""

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        command, environment = self.prepare()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | environment
            )
        wait_until_serving(self.port, self.trusted_ca(), self._process, self.log)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def processes(self) -> Iterator[tuple[int, str]]:
        """(pid, role) of each process that is up."""
        assert self._process is not None
        for pid in cpu.descendants(self._process.pid):
            yield pid, self.role(cpu.command_line(pid))

    def cpu_seconds_by_role(self) -> dict[str, float]:
        """CPU seconds used so far."""
        used: dict[str, float] = {}
        for pid, role in self.processes():
            used[role] = used.get(role, 0.0) + cpu.cpu_seconds(pid)
        return used


class Nginx(Setup):
    """nginx, one location that answers by itself, without an access log."""

    @abc.abstractmethod
    def listen(self) -> str:
        """The server's `listen` and `ssl_*` directives."""

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write nginx.conf."""
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        configuration = self.directory / "nginx.conf"
        configuration.write_text(f"""
            daemon off; worker_processes {self.workers}; pid {self.directory}/nginx.pid; error_log stderr warn;
            events {{ worker_connections 20000; }}
            http {{
                access_log off; client_body_temp_path {self.directory}/body; proxy_temp_path {self.directory}/proxy;
                fastcgi_temp_path {self.directory}/f; uwsgi_temp_path {self.directory}/u;
                scgi_temp_path {self.directory}/s;
                server {{
                    {self.listen()}
                    location / {{ return 200 "ok\\n"; }}
                }}
            }}
        """)
        return [nginx, "-p", str(self.directory), "-c", str(configuration)], {}

    def role(self, command_line: str) -> str:
        """Workers do the work, keys included."""
        return "proxy" if "worker process" in command_line else ""


class NginxPlain(Nginx):
    """nginx without TLS: a back end."""

    name = "nginx-plain"

    def trusted_ca(self) -> None:
        """No TLS."""

    def listen(self) -> str:
        """Plain TCP."""
        return f"listen 127.0.0.1:{self.port};"


class NginxKeyFile(Nginx):
    """nginx with the key in a file, and so in its memory: what most of the world runs."""

    name = "nginx-key-file"

    def listen(self) -> str:
        """TLS with tickets and all else as by default, and this proxy's groups."""
        return f"""
            listen 127.0.0.1:{self.port} ssl backlog=4096;
            ssl_certificate {self.credential.chain_file}; ssl_certificate_key {self.credential.key_file};
            ssl_protocols TLSv1.2 TLSv1.3; ssl_ecdh_curve X25519:prime256v1:secp384r1;
        """


class Tlsproxy(Setup):
    """This proxy. The back end behind it is an nginx that answers by itself, so that requests can be made as well."""

    name = "tlsproxy"

    @abc.abstractmethod
    def prepare_token(self) -> str:
        """Make a token that holds the key as `perf`; return its YAML."""

    def prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write config.yaml for one listener, one route and one upstream."""
        token = self.prepare_token()
        self._backend_port = free_port()
        configuration = self.directory / "config.yaml"
        configuration.write_text(f"""
workers: {self.workers}
runtime_dir: run
log: {{level: error, format: text}}
hsm:
  tokens:
    - {token}
certificates:
  - {{name: perf, chain_file: {self.credential.chain_file}, key: perf, tokens: [perf]}}
listeners:
  - address: 127.0.0.1:{self.port}
    mode: http
    certificates: [perf]
    routes:
      - {{host: "*", path: /, upstream: app}}
upstreams:
  - {{name: app, servers: [{{address: 127.0.0.1:{self._backend_port}}}]}}
""")
        return [sys.executable, "-m", "tlsproxy", "run", "--config", str(configuration)], {}

    def __enter__(self) -> Self:
        """Start the back end, then the proxy."""
        super().__enter__()
        self._backend = NginxPlain(self.directory / "backend", self.credential, workers=1, port=self._backend_port)
        self._backend.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        """End both."""
        super().__exit__(*details)
        self._backend.__exit__(*details)

    def role(self, command_line: str) -> str:
        """Proxy and HSM workers have their module in the command line."""
        if "hsm.worker" in command_line:
            return "hsm"
        return "proxy" if "tlsproxy.serve.worker" in command_line else ""


class TlsproxySoft(Tlsproxy):
    """This proxy with the embedded soft token."""

    name = "tlsproxy-soft"

    def prepare_token(self) -> str:
        """Import the key into a new token file."""
        pin_file, token = self.directory / "token.pin", self.directory / "token"
        pin_file.touch(mode=0o600)
        pin_file.write_text(PIN)
        hsm = [sys.executable, "-m", "hsm.cli"]
        at = ["--token", str(token), "--pin-file", str(pin_file)]
        key = ["--label", "perf", "--key", str(self.credential.key_file)]
        subprocess.run([*hsm, "init", *at], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*hsm, "import", *at, *key], check=True, stdout=subprocess.DEVNULL)
        return "{name: perf, kind: soft, path: token, pin_file: token.pin, workers: 1}"


class SlowHsm:
    """A SoftHSM2 token that holds the key as `perf`, behind a module whose C_Sign takes as long as `control` says."""

    def __init__(self, directory: Path, credential: Credential) -> None:
        directory.mkdir(parents=True)
        self.store = SoftHsm(directory)
        self.store.add_token("perf", PIN)
        key = serialization.load_pem_private_key(credential.key_file.read_bytes(), None)
        assert isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
        self.store.import_key("perf", key, "perf", pin=PIN)
        self.control = FaultModule(directory, SOFTHSM_MODULE, self.store.environment)


class TlsproxySlowHsm(Tlsproxy):
    """This proxy with SoftHSM2 behind the module that sleeps."""

    name = "tlsproxy-softhsm"

    def __init__(self, directory: Path, credential: Credential, workers: int, hsm: SlowHsm, sessions: int) -> None:
        super().__init__(directory, credential, workers)
        self._hsm = hsm
        self._sessions = sessions

    def prepare_token(self) -> str:
        """Name the module and the token."""
        pin_file = self.directory / "token.pin"
        pin_file.touch(mode=0o600)
        pin_file.write_text(PIN)
        return (
            f"{{name: perf, kind: pkcs11, module: {self._hsm.control.path}, token_label: perf, pin_file: token.pin, "
            f"sessions: {self._sessions}}}"
        )
