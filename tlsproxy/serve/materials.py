"""What the configuration refers to: certificate chains, the public keys that must go with them, CAs of clients.

Everything found wrong here is a Problem at the place in the configuration that refers to it.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hsm.errors import HsmError
from hsm.keyreference import KeyReference
from hsm.messages import KeyInfo
from hsm.vault import read_public_keys
from tlsproxy.config import Address, CertificateConfig, ClientCertificatesConfig, Config, TokenConfig
from tlsproxy.errors import ConfigError, Problem
from tlsproxy.tls.certificates import Certificate, CertificateError, load_chain
from tlsproxy.tls.client_authorities import ClientAuthorities, client_authorities, load_client_cas, load_crls
from tlsproxy.tls.client_certificates import ClientVerification
from tlsproxy.tls.context import TlsContext

MAX_CHAIN_BYTES = 1 << 20
MAX_CRL_BYTES = 8 << 20
_TRACING_PACKAGES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")


@dataclass(frozen=True, slots=True)
class Material:
    """A configured certificate with its chain as read."""

    config: CertificateConfig
    certificate: Certificate
    pem: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Materials:
    """All that a configuration refers to, as read."""

    certificates: Mapping[str, Material]
    """By name."""
    client_authorities: Mapping[Address, ClientAuthorities]
    """By the address of the listener that verifies its clients by them."""


def file_version(path: Path | None) -> tuple[int, ...] | None:
    """Return what differs between versions of a file; None if there is none."""
    try:
        found = None if path is None else path.stat()
    except OSError:
        found = None
    return None if found is None else (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def file_versions(config: Config) -> list[tuple[int, ...] | None]:
    """Return the versions of the chain files, of the CAs and CRLs for clients, and of soft tokens."""
    paths = [certificate.chain_file for certificate in config.certificates]
    for listener in config.listeners:
        if (clients := listener.client_certificates) is not None:
            paths += [clients.ca_file] if clients.crl_file is None else [clients.ca_file, clients.crl_file]
    return [file_version(path) for path in (*paths, *(token.path for token in config.hsm.tokens))]


def load_materials(config: Config) -> Materials:
    """Read every certificate chain and what clients are verified by. Raises ConfigError with all problems.

    Packages that only some configurations need are looked for, too.
    """
    materials = {}
    authorities = {}
    problems = list(_tracing_problems(config))
    for certificate_config in config.certificates:
        found = _load(certificate_config)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            materials[certificate_config.name] = found
    for listener in config.listeners:
        if listener.client_certificates is not None:
            loaded = _load_authorities(listener.client_certificates)
            if isinstance(loaded, Problem):
                problems.append(loaded)
            else:
                authorities[listener.address] = loaded
    if problems:
        raise ConfigError(problems)
    return Materials(materials, authorities)


def _load(config: CertificateConfig) -> Material | Problem:
    try:
        pem = _content(config.chain_file, MAX_CHAIN_BYTES)
        certificate = load_chain(config.name, pem, str(config.chain_file))
        TlsContext([certificate])
    except CertificateError as error:
        return config.origin.problem("chain_file", f"{config.chain_file}: {error.message}")
    return Material(config, certificate, pem)


def _load_authorities(config: ClientCertificatesConfig) -> ClientAuthorities | Problem:
    key, path = "ca_file", config.ca_file
    try:
        cas = load_client_cas(_content(path, MAX_CHAIN_BYTES), str(path))
        found = client_authorities(cas, ())
        ClientVerification(found, required=True, depth=config.depth).verifier(str(path))
        if config.crl_file is not None:
            key, path = "crl_file", config.crl_file
            found = client_authorities(cas, load_crls(_content(path, MAX_CRL_BYTES), cas, str(path)))
            ClientVerification(found, required=True, depth=config.depth).verifier(str(path))
    except CertificateError as error:
        return config.origin.problem(key, f"{path}: {error.message}")
    return found


def _content(path: Path, max_bytes: int) -> bytes:
    """Return what is in a file. Raises CertificateError."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CertificateError(str(path), f"expected a readable file; got {error.strerror}") from None
    if len(content) > max_bytes:
        raise CertificateError(str(path), f"expected at most {max_bytes} bytes; got more")
    return content


def _tracing_problems(config: Config) -> Iterable[Problem]:
    """What tracing needs is not needed otherwise, and so may not be installed."""
    tracing = config.tracing
    if tracing is not None and not all(map(_is_installed, _TRACING_PACKAGES)):
        message = "expected tlsproxy's extra `otel` (pip install tlsproxy[otel]); got an installation without it"
        yield tracing.origin.problem("endpoint", message)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        # The package that it would be in isn't there either.
        return False


def check_materials(config: Config, materials: Materials) -> None:
    """Check what can be checked before anything runs. Raises ConfigError with all problems.

    A soft token's file tells its public keys to everyone; what a PKCS#11 token holds is known only once its worker has
    logged in. A CRL that has expired is an error here, where nobody waits to be served.
    """
    problems = list(_crl_problems(config, materials.client_authorities))
    readable: dict[str, Sequence[KeyInfo]] = {}
    for token in config.hsm.tokens:
        problems += _pin_problems(token)
        if token.module is not None and not token.module.is_file():
            problems.append(
                token.origin.problem("module", f"{token.module}: expected a PKCS#11 library; got no such file")
            )
        if token.path is not None:
            try:
                readable[token.name] = read_public_keys(str(token.path))
            except HsmError as error:
                problems.append(token.origin.problem("path", str(error)))
    problems += key_problems(materials.certificates.values(), readable)
    if problems:
        raise ConfigError(problems)


def _crl_problems(config: Config, authorities: Mapping[Address, ClientAuthorities]) -> Iterable[Problem]:
    now = datetime.datetime.now(datetime.timezone.utc)
    for listener in config.listeners:
        clients = listener.client_certificates
        if clients is not None and not (found := authorities[listener.address]).crls_are_valid_at(now):
            period = f"{found.this_update} to {found.next_update}"
            message = f"expected CRLs that are valid now, as clients are refused otherwise; got some from {period}"
            yield clients.origin.problem("crl_file", f"{clients.crl_file}: {message}")


def _pin_problems(token: TokenConfig) -> Iterable[Problem]:
    """The value stays out of the message: a PIN may have been written there by mistake."""
    if token.pin_file is not None and not Path(token.pin_file).is_file():
        yield token.origin.problem("pin_file", "expected a file; got none of that name")
    if token.pin_env is not None and not os.environ.get(token.pin_env):
        yield token.origin.problem("pin_env", "expected an environment variable that is set; got one that is not")


def key_problems(materials: Iterable[Material], tokens: Mapping[str, Sequence[KeyInfo]]) -> list[Problem]:
    """Compare each certificate's public key with the key it names in each of its tokens, of those given."""
    problems = []
    for material in materials:
        reference = KeyReference.parse(material.config.key)
        for token in material.config.tokens:
            if token not in tokens:
                continue
            found = [key for key in tokens[token] if reference.matches(key)]
            if not found:
                labels = ", ".join(sorted(key.label for key in tokens[token])) or "no key"
                message = f"expected a key that token {token!r} has ({labels}); got {material.config.key!r}"
                problems.append(material.config.origin.problem("key", message))
            elif all(key.public_key != material.certificate.public_key for key in found):
                message = (
                    f"expected the key of {material.config.chain_file} ({material.certificate.key_type.value}); got "
                    f"another one ({found[0].key_type.value}) under {material.config.key!r} in token {token!r}"
                )
                problems.append(material.config.origin.problem("key", message))
    return problems
