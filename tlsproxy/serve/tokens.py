"""The tokens' worker processes, as the configuration wants them, and whether their keys fit the certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from types import TracebackType

from typing_extensions import assert_never

from hsm.errors import TokenConfigError, WorkerFailed
from hsm.launcher import AwsKmsToken, Pkcs11Token, SoftToken, Token, WorkerGroup
from hsm.pool import TokenEndpoints
from tlsproxy.config import Config, TokenConfig, TokenKind
from tlsproxy.errors import ConfigError, Problem, StartupError
from tlsproxy.serve.materials import Material, key_problems

READY_TIMEOUT_S = 30.0

_logger = logging.getLogger("tlsproxy.supervisor")


class TokenGroups:
    """One WorkerGroup for each token. An async context: on leaving it the workers end."""

    def __init__(self, config: Config) -> None:
        """Make the workers' sockets in the runtime directory. Raises StartupError and ConfigError."""
        self._configs = {token.name: token for token in config.hsm.tokens}
        self._groups = {
            token.name: _group(token, _keys_used(config, token.name), config) for token in config.hsm.tokens
        }

    async def __aenter__(self) -> TokenGroups:
        for group in self._groups.values():
            group.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(group.stop() for group in self._groups.values()))

    async def wait_ready(self, materials: Mapping[str, Material]) -> None:
        """Wait until the tokens are open, and compare their keys with the certificates.

        A token that is away for the moment only costs a warning as long as every certificate has another.

        Raises ConfigError where a token or a key is not what the configuration says, StartupError where a certificate's
        tokens are all away.
        """
        results = await asyncio.gather(
            *(group.wait_ready(READY_TIMEOUT_S) for group in self._groups.values()), return_exceptions=True
        )
        outcomes = dict(zip(self._groups, results, strict=True))
        problems = [self._token_problem(name, group) for name, group in self._groups.items() if group.failure]
        ready = {name: self._groups[name].keys for name, result in outcomes.items() if result is None}
        problems += key_problems(materials.values(), ready)
        if problems:
            raise ConfigError(problems)
        away = {name: str(result) for name, result in outcomes.items() if isinstance(result, WorkerFailed)}
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, WorkerFailed):
                raise result
        for material in materials.values():
            if not ready.keys() & set(material.config.tokens):
                reasons = "; ".join(away[token] for token in material.config.tokens)
                raise StartupError(f"certificate {material.config.name!r}: none of its tokens is ready: {reasons}")
        for reason in away.values():
            _logger.warning("starting without a token", extra={"reason": reason})

    def _token_problem(self, name: str, group: WorkerGroup) -> Problem:
        key = {TokenKind.SOFT: "path", TokenKind.PKCS11: "module", TokenKind.AWSKMS: "region"}[self._configs[name].kind]
        return self._configs[name].origin.problem(key, f"expected a token that opens; got: {group.failure}")

    @property
    def endpoints(self) -> tuple[TokenEndpoints, ...]:
        """Where the workers listen, for the proxy workers' pools."""
        return tuple(group.endpoints for group in self._groups.values())

    @property
    def metrics_fds(self) -> tuple[int, ...]:
        """The workers' metric stores."""
        return tuple(fd for group in self._groups.values() for fd in group.metric_fds)


def _keys_used(config: Config, token: str) -> tuple[str, ...]:
    """Return the keys that certificates have on this token: its workers are to sign with no other."""
    return tuple(dict.fromkeys(certificate.key for certificate in config.certificates if token in certificate.tokens))


def _group(token: TokenConfig, keys: tuple[str, ...], config: Config) -> WorkerGroup:
    directory = str(config.runtime_dir)
    try:
        return WorkerGroup(
            _token(token, keys), directory, log_level=config.log.level.value, log_format=config.log.format.value
        )
    except TokenConfigError as error:
        raise StartupError(f"runtime_dir: {error}") from None
    except OSError as error:
        raise StartupError(f"runtime_dir: cannot use {directory}: {error.strerror}") from None


def _token(config: TokenConfig, keys: tuple[str, ...]) -> Token:
    pin_file = None if config.pin_file is None else str(config.pin_file)
    match config.kind:
        case TokenKind.SOFT:
            return SoftToken(
                name=config.name,
                path=str(config.path),
                pin_file=pin_file,
                pin_env=config.pin_env,
                workers=config.workers,
            )
        case TokenKind.PKCS11:
            return Pkcs11Token(
                name=config.name,
                module=str(config.module),
                token_label=config.token_label,
                token_serial=config.token_serial,
                slot=config.slot,
                pin_file=pin_file,
                pin_env=config.pin_env,
                sessions=config.sessions,
                keys=keys,
                workers=config.workers,
            )
        case TokenKind.AWSKMS:
            assert config.region is not None
            return AwsKmsToken(
                name=config.name,
                region=config.region,
                endpoint_url=config.endpoint_url,
                sessions=config.sessions,
                keys=keys,
                workers=config.workers,
            )
        case _:
            assert_never(config.kind)
