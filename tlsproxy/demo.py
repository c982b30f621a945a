"""`tlsproxy demo`: a complete set-up on one machine, made in a directory that a second run finds again.

A soft token with its key, a demo CA, a certificate for localhost, a sample back end as a process of its own, and a
configuration file that `tlsproxy run` takes just as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from hsm import logs
from hsm.errors import TokenFileError
from hsm.keys import generate_private_key, load_public_key
from hsm.messages import KeyInfo, KeyType
from hsm.pin import create_pin_file, read_pin, wipe
from hsm.pki import make_demo_ca
from hsm.vault import Vault, read_public_keys
from tlsproxy.config_yaml import load_config
from tlsproxy.errors import StartupError
from tlsproxy.serve.materials import load_materials
from tlsproxy.serve.supervisor import Supervisor

KEY_TYPES = (KeyType.ECDSA_P256, KeyType.RSA_2048)
_DNS_NAMES = ("localhost",)
_IP_ADDRESSES = ("127.0.0.1", "::1")
_RENEW_BEFORE = datetime.timedelta(days=1)

_CONFIGURATION = """\
# Written by `tlsproxy demo`, anew at each start.
workers: {workers}
log: {{level: warning, format: text}}
hsm:
  tokens:
    - {{name: demo, kind: soft, path: token, pin_file: token.pin}}
certificates:
  - {{name: localhost, chain_file: {chain_file}, key: {key_label}}}
listeners:
  - address: 127.0.0.1:{port}
    certificates: [localhost]
    routes: [{{upstream: app}}]
upstreams:
  - {{name: app, servers: [{{address: "{upstream}"}}]}}
admin: {{address: 127.0.0.1:{admin_port}}}
"""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """What the command line says."""

    directory: Path
    port: int
    admin_port: int
    key_type: KeyType
    workers: int
    """Proxy workers; 0 means one for each core."""
    upstream: str | None
    """`host:port` of a back end; None means the sample one."""


async def run(settings: DemoSettings) -> None:
    """Make what is missing, run until SIGINT or SIGTERM. Raises StartupError, ConfigError and HsmError."""
    key_label = f"demo-{settings.key_type.value}"
    chain_file = f"{key_label}.pem"
    prepare(settings.directory, settings.key_type, key_label, chain_file)
    async with _back_end(settings.upstream) as upstream:
        config_file = settings.directory / "config.yaml"
        config_file.write_text(
            _CONFIGURATION.format(
                workers=settings.workers or "auto",
                chain_file=chain_file,
                key_label=key_label,
                port=settings.port,
                upstream=upstream,
                admin_port=settings.admin_port,
            )
        )
        config = load_config(str(config_file))
        logs.configure(config.log.level.value, config.log.format.value, "supervisor")
        supervisor = Supervisor(str(config_file), config, load_materials(config), on_ready=lambda: _announce(settings))
        await supervisor.run()


def _announce(settings: DemoSettings) -> None:
    ca_file = os.path.relpath(settings.directory / "ca.pem")
    lines = (
        f"tlsproxy serves https://localhost:{settings.port}/ with a key that only its HSM worker process holds. Try:",
        "",
        f"    curl --cacert {ca_file} https://localhost:{settings.port}/",
        "",
        f"Status: http://127.0.0.1:{settings.admin_port}/   Metrics: http://127.0.0.1:{settings.admin_port}/metrics",
        f"Configuration: {os.path.relpath(settings.directory / 'config.yaml')}   Ctrl-C ends the demo.",
    )
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def prepare(directory: Path, key_type: KeyType, key_label: str, chain_file: str) -> None:
    """Make token, key, CA and certificate in `directory`, as far as they are not there and good for another day.

    The CA's key is never stored: a certificate that is missing or old is made by a new CA, which replaces `ca.pem`.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        pin_file = directory / "token.pin"
        with contextlib.suppress(FileExistsError):
            create_pin_file(str(pin_file))
        key = _ensure_key(directory / "token", pin_file, key_type, key_label)
        if not _is_current(directory / chain_file, directory / "ca.pem", key):
            ca = make_demo_ca()
            (directory / chain_file).write_bytes(ca.issue_leaf(key.public_key, _DNS_NAMES, _IP_ADDRESSES))
            (directory / "ca.pem").write_bytes(ca.certificate_pem())
    except OSError as error:
        raise StartupError(f"demo: {error.filename or directory}: {error.strerror}") from None
    except TokenFileError as error:
        raise StartupError(f"{error} (remove {directory} to start afresh)") from None


def _ensure_key(token: Path, pin_file: Path, key_type: KeyType, label: str) -> KeyInfo:
    if token.exists():
        for key in read_public_keys(str(token)):
            if key.label == label:
                return key
    pin = read_pin(str(pin_file), None)
    try:
        vault = Vault.open(str(token), pin) if token.exists() else Vault.create(str(token), pin)
        return vault.add(label, generate_private_key(key_type))
    finally:
        wipe(pin)


def _is_current(chain_file: Path, ca_file: Path, key: KeyInfo) -> bool:
    """Tell whether the certificate is the key's, of this CA, and valid for another day."""
    if not (chain_file.exists() and ca_file.exists()):
        return False
    try:
        leaf = x509.load_pem_x509_certificate(chain_file.read_bytes())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_file.read_bytes()))
    except (ValueError, TypeError, InvalidSignature):
        return False
    soon = datetime.datetime.now(datetime.timezone.utc) + _RENEW_BEFORE
    return leaf.not_valid_after_utc > soon and leaf.public_key() == load_public_key(key.public_key)


@contextlib.asynccontextmanager
async def _back_end(upstream: str | None) -> AsyncIterator[str]:
    """Yield the address of the back end; run the sample one meanwhile if there is no other."""
    if upstream is not None:
        yield upstream
        return
    # Its standard input tells it when this process is gone, however that came about.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tlsproxy.demo_backend", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        port = (await process.stdout.readline()).decode().strip()
        if not port:
            raise StartupError("demo: the sample back end did not start")
        yield f"127.0.0.1:{port}"
    finally:
        process.stdin.close()
        await process.wait()
