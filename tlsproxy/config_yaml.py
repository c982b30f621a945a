"""The configuration file: what each key may be, its default, and what must go together.

Every problem is found in one go and carries file, line and column. What needs a look at other files (certificates,
tokens) is checked later, by `serve.materials`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from hsm.keyreference import KeyReference
from tlsproxy.config import (
    AdminConfig,
    CertificateConfig,
    Config,
    HsmConfig,
    LogConfig,
    LogFormat,
    LogLevel,
    RouteConfig,
    TokenConfig,
    TokenKind,
    TracingConfig,
    UpstreamConfig,
)
from tlsproxy.cores import usable_cores
from tlsproxy.errors import ConfigError, Problem
from tlsproxy.yaml_listeners import read_listener
from tlsproxy.yaml_nodes import MAX_FILE_BYTES, Document, InvalidValueError, MappingReader, Value
from tlsproxy.yaml_upstreams import read_upstream
from tlsproxy.yaml_values import NOWHERE, read_listen_address, read_name

_REGION = re.compile(r"[a-z]{2}(-[a-z]+)+-[0-9]+")
_HTTPS_URL = re.compile(r"https://[!-~]+|http://(127\.0\.0\.1|localhost)(:[0-9]+)?/?")
_COLLECTOR_URL = re.compile(r"https?://(?:[A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?(?:/[!-~]*)?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}|[0-9]{1,9}")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

Named = TypeVar("Named", TokenConfig, CertificateConfig, UpstreamConfig)


def load_config(file: str) -> Config:
    """Read the configuration in `file`. Raises ConfigError with every problem found."""
    return parse_config(_content(file), file, Path(file).absolute().parent)


def load_runtime_dir(file: str) -> Path:
    """Read `runtime_dir` alone: it may be asked for while the rest is wrong. Raises ConfigError."""
    directory = Path(file).absolute().parent
    document = Document(file, directory)
    root = document.parse(_content(file))
    with contextlib.suppress(InvalidValueError):
        return _runtime_dir(root.mapping(), directory)
    raise ConfigError(document.problems)


def _content(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem(file, 1, 1, "(file)", f"expected a readable file; got {error.strerror}")]) from None


def _runtime_dir(root: MappingReader, directory: Path) -> Path:
    return root.optional("runtime_dir", Value.path_name, directory / "run")


def parse_config(content: bytes, file: str, directory: Path) -> Config:
    """Read the configuration in `content`; `file` names it in messages, relative paths are relative to `directory`.

    Raises ConfigError with every problem found.
    """
    document = Document(file, directory)
    root = document.parse(content)
    try:
        config = _config(root.mapping(), directory)
        _check_references(config, document.problems)
    except InvalidValueError:
        pass
    if document.problems:
        raise ConfigError(sorted(document.problems, key=lambda problem: (problem.line, problem.column)))
    return config


def _config(root: MappingReader, directory: Path) -> Config:
    log = root.section("log")
    hsm = root.section("hsm")
    no_tokens: tuple[TokenConfig, ...] = ()
    tokens = hsm.required("tokens", lambda value: value.each(_token, at_least=1), no_tokens)
    config = Config(
        workers=root.optional("workers", _workers, usable_cores()),
        runtime_dir=_runtime_dir(root, directory),
        drain_timeout_s=root.optional("drain_timeout", lambda value: value.duration(0.1, 86400), 30.0),
        user=root.optional("user", _user, None),
        hsm_user=root.optional("hsm_user", _user, None),
        watch_certificates=root.optional("watch_certificates", Value.boolean, False),
        hang_timeout_s=root.optional("hang_timeout", lambda value: value.duration(2, 3600), 10.0),
        log=LogConfig(
            level=log.optional("level", lambda value: value.choice(LogLevel), LogLevel.INFO),
            format=log.optional("format", lambda value: value.choice(LogFormat), LogFormat.JSON),
            access=log.optional("access", Value.boolean, True),
            handshakes=log.optional("handshakes", Value.boolean, True),
            sample_above=log.optional("sample_above", lambda value: value.integer(0, 1_000_000), 1000),
        ),
        hsm=HsmConfig(
            sign_deadline_s=hsm.optional("sign_deadline", lambda value: value.duration(0.01, 60), 2.0),
            open_timeout_s=hsm.optional("open_timeout", lambda value: value.duration(1, 3600), 20.0),
            max_pending=hsm.optional("max_pending", lambda value: value.integer(1, 1_000_000), 2048),
            tokens=tokens,
        ),
        certificates=root.required(
            "certificates",
            lambda value: value.each(
                lambda item: _certificate(item, tuple(token.name for token in tokens)), at_least=1
            ),
            (),
        ),
        listeners=root.required("listeners", lambda value: value.each(read_listener, at_least=1), ()),
        upstreams=root.required("upstreams", lambda value: value.each(read_upstream, at_least=1), ()),
        admin=root.optional("admin", _admin, None),
        tracing=root.optional("tracing", _tracing, None),
    )
    for reader in (log, hsm, root):
        reader.finish()
    return config


def _user(value: Value) -> str:
    return value.text("the name of a user or a uid", _USER)


def _workers(value: Value) -> int:
    return usable_cores() if value.text("a number or auto") == "auto" else value.integer(1, 1024, " or auto")


def _token(value: Value) -> TokenConfig:
    reader = value.mapping()
    name = reader.required("name", read_name, "")
    kind = reader.required("kind", lambda item: item.choice(TokenKind), TokenKind.SOFT)
    path = module = token_label = token_serial = slot = region = endpoint_url = None
    sessions = 1
    if kind is TokenKind.SOFT:
        path = reader.required("path", Value.path_name, None)
    else:
        sessions = reader.optional("sessions", lambda item: item.integer(1, 1024), 16)
    if kind is TokenKind.PKCS11:
        module = reader.required("module", Value.path_name, None)
        token_label = reader.optional("token_label", Value.text, None)
        token_serial = reader.optional("token_serial", Value.text, None)
        slot = reader.optional("slot", lambda item: item.integer(0, (1 << 63) - 1), None)
        if not any(map(reader.get, ("token_label", "token_serial", "slot"))):
            value.note("expected token_label, token_serial or slot; got none of them")
    pin_file = pin_env = None
    if kind is TokenKind.AWSKMS:
        region = reader.required("region", _region, "")
        endpoint_url = reader.optional("endpoint_url", _https_url, None)
    else:
        pin_file = reader.optional("pin_file", lambda item: item.path_name(secret=True), None)
        pin_env = reader.optional("pin_env", _environment_name, None)
        given = [key for key in ("pin_file", "pin_env") if reader.get(key) is not None]
        if len(given) != 1:
            value.note(f"expected exactly one of pin_file and pin_env; got {'both' if given else 'neither'}")
    workers = reader.optional(
        "workers", lambda item: item.integer(1, 256), usable_cores() if kind is TokenKind.SOFT else 1
    )
    reader.finish()
    return TokenConfig(
        name=name,
        kind=kind,
        pin_file=pin_file,
        pin_env=pin_env,
        workers=workers,
        path=path,
        module=module,
        token_label=token_label,
        token_serial=token_serial,
        slot=slot,
        region=region,
        endpoint_url=endpoint_url,
        sessions=sessions,
        origin=value.origin,
    )


def _region(value: Value) -> str:
    return value.text("an AWS region such as eu-central-1", _REGION)


def _https_url(value: Value) -> str:
    return value.text("a URL such as https://HOST (http only on loopback)", _HTTPS_URL)


def _environment_name(value: Value) -> str:
    return value.text("the name of an environment variable", _ENVIRONMENT_NAME, secret=True)


def _certificate(value: Value, all_tokens: tuple[str, ...]) -> CertificateConfig:
    reader = value.mapping()
    certificate = CertificateConfig(
        name=reader.required("name", read_name, ""),
        chain_file=reader.required("chain_file", Value.path_name, Path()),
        key=reader.required("key", _key, ""),
        tokens=reader.optional("tokens", lambda item: item.each(read_name, at_least=1), all_tokens),
        origin=value.origin,
    )
    reader.finish()
    return certificate


def _key(value: Value) -> str:
    text = value.text("a key's label or a pkcs11: URI")
    try:
        KeyReference.parse(text)
    except ValueError as error:
        value.note(str(error))
        raise InvalidValueError from None
    return text


def _admin(value: Value) -> AdminConfig:
    reader = value.mapping()
    admin = AdminConfig(address=reader.required("address", read_listen_address, NOWHERE))
    reader.finish()
    return admin


def _tracing(value: Value) -> TracingConfig:
    reader = value.mapping()
    tracing = TracingConfig(
        endpoint=reader.required("endpoint", _collector_url, ""),
        sample=reader.optional("sample", Value.share, 0.1),
        service_name=reader.optional("service_name", Value.text, "tlsproxy"),
        origin=value.origin,
    )
    reader.finish()
    return tracing


def _collector_url(value: Value) -> str:
    """Return the URL that spans are posted to; without a path, OTLP's own is meant."""
    expected = "a URL such as http://127.0.0.1:4318/v1/traces, without user and password"
    text = value.text(expected, _COLLECTOR_URL, secret=True)
    return text if text.count("/") > 2 else f"{text}/v1/traces"


def _check_references(config: Config, problems: list[Problem]) -> None:
    """Note names that are taken twice and names nobody has."""
    tokens = _names("token", config.hsm.tokens, problems)
    certificates = _names("certificate", config.certificates, problems)
    upstreams = _names("upstream", config.upstreams, problems)
    addresses = [] if config.admin is None else [config.admin.address]

    for certificate in config.certificates:
        problems += [
            certificate.origin.problem("tokens", _unknown("token", name, tokens))
            for name in certificate.tokens
            if name not in tokens
        ]
    for listener in config.listeners:
        problems += [
            listener.origin.problem("certificates", _unknown("certificate", name, certificates))
            for name in listener.certificates
            if name not in certificates
        ]
        if listener.upstream and listener.upstream not in upstreams:
            problems.append(listener.origin.problem("upstream", _unknown("upstream", listener.upstream, upstreams)))
        if any(item.name == listener.upstream and item.hash.name for item in config.upstreams):
            message = "expected an upstream that does not hash a header or cookie, as mode is tcp; got one that does"
            problems.append(listener.origin.problem("upstream", message))
        if listener.address != NOWHERE and listener.address in addresses:
            message = f"expected an address used once; got {listener.address} again"
            problems.append(listener.origin.problem("address", message))
        addresses.append(listener.address)
        _check_routes(listener.routes, upstreams, problems)


def _check_routes(routes: Iterable[RouteConfig], upstreams: set[str], problems: list[Problem]) -> None:
    seen = set()
    for route in routes:
        if route.upstream and route.upstream not in upstreams:
            problems.append(route.origin.problem("upstream", _unknown("upstream", route.upstream, upstreams)))
        if (route.host, route.path) in seen:
            message = f"expected one route for host {route.host!r} and path {route.path!r}; got another"
            problems.append(route.origin.problem("path", message))
        seen.add((route.host, route.path))


def _names(what: str, items: Iterable[Named], problems: list[Problem]) -> set[str]:
    names: set[str] = set()
    for item in items:
        if item.name and item.name in names:
            problems.append(
                item.origin.problem("name", f"expected a name no other {what} has; got {item.name!r} again")
            )
        names.add(item.name)
    return names


def _unknown(what: str, name: str, known: set[str]) -> str:
    return f"expected the name of a configured {what} ({', '.join(sorted(known - {''})) or 'none is'}); got {name!r}"
