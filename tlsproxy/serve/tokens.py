"""The tokens' worker processes, as the configuration wants them, and whether their keys fit the certificates."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from typing_extensions import assert_never

from hsm.errors import TokenConfigError, WorkerFailed
from hsm.launcher import AwsKmsToken, Pkcs11Token, SoftToken, Token, WorkerGroup
from hsm.messages import KeyInfo
from hsm.pool import TokenEndpoints
from tlsproxy.config import Config, TokenConfig, TokenKind
from tlsproxy.errors import ConfigError, Problem, StartupError
from tlsproxy.serve.materials import Material, file_version, key_problems
from tlsproxy.serve.users import identity

READY_TIMEOUT_S = 30.0
STRAGGLER_TIMEOUT_S = 3.0
"""How long tokens are waited for when each certificate has another that is ready."""

_logger = logging.getLogger("tlsproxy.supervisor")
_directory_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class _Running:
    """The workers of a token, and all that they were started with."""

    started_with: tuple[object, ...]
    group: WorkerGroup
    directory: Path


class TokenGroups:
    """One WorkerGroup for each token of a configuration.

    Those of a previous configuration that would be started no differently go on running, and belong to both.
    As an async context: the workers run while it lasts.
    """

    def __init__(self, config: Config, previous: TokenGroups | None = None) -> None:
        """Make the workers' sockets in the runtime directory. Raises StartupError."""
        self._configs = {token.name: token for token in config.hsm.tokens}
        self._running: dict[str, _Running] = {}
        self._new: list[WorkerGroup] = []
        for token in config.hsm.tokens:
            launched = _token(token, _keys_used(config, token.name))
            users = (config.user, config.hsm_user)
            # A worker reads the soft token and the PIN once, at its start.
            files = (file_version(token.path), file_version(token.pin_file))
            timeouts = (config.hsm.open_timeout_s, config.hang_timeout_s)
            started_with = (launched, config.log, timeouts, users, files)
            present = None if previous is None else previous._running.get(token.name)
            if present is not None and present.started_with == started_with and present.group.failure is None:
                self._running[token.name] = present
            else:
                directory = config.runtime_dir / f"hsm-{os.getpid()}-{next(_directory_numbers)}"
                group = _group(launched, directory, config)
                self._running[token.name] = _Running(started_with, group, directory)
                self._new.append(group)

    async def __aenter__(self) -> TokenGroups:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def start(self) -> None:
        """Start the workers that don't run yet."""
        for group in self._new:
            group.start()

    async def stop(self, keep: Iterable[TokenGroups] = (), absorb: Callable[[int], None] | None = None) -> None:
        """End the workers that do not belong to `keep` too; `absorb` is called with each of their metric stores."""
        kept = {running.group for other in keep for running in other._running.values()}
        ending = [running for running in self._running.values() if running.group not in kept]
        await asyncio.gather(*(running.group.stop(absorb=absorb) for running in ending))
        for running in ending:
            with contextlib.suppress(OSError):
                running.directory.rmdir()

    async def wait_ready(self, materials: Mapping[str, Material], *, all_new: bool = False) -> None:
        """Wait until the tokens are open, and compare their keys with the certificates.

        A token that is away for the moment only costs a warning as long as every certificate has another, unless
        `all_new`: then every token that did not run before must open.

        Raises ConfigError where a token or a key is not what the configuration says, StartupError where a token that
        is needed is away.
        """
        away = await self._open(materials, all_new=all_new)
        problems = [self._token_problem(name, failure) for name, failure in self._failures().items()]
        ready = self._keys()
        problems += key_problems(materials.values(), ready)
        if problems:
            raise ConfigError(problems)
        if all_new and away:
            raise StartupError("; ".join(away.values()))
        for material in materials.values():
            if not ready.keys() & set(material.config.tokens):
                reasons = "; ".join(away[token] for token in material.config.tokens)
                raise StartupError(f"certificate {material.config.name!r}: none of its tokens is ready: {reasons}")
        for reason in away.values():
            _logger.warning("starting without a token", extra={"reason": reason})

    async def _open(self, materials: Mapping[str, Material], *, all_new: bool) -> dict[str, str]:
        """Wait for the new tokens; return why those are away that are not waited for any longer, by name."""
        waits = {
            name: asyncio.create_task(running.group.wait_ready(READY_TIMEOUT_S))
            for name, running in self._running.items()
            if running.group in self._new
        }
        try:
            _, waiting = await asyncio.wait(waits.values(), timeout=STRAGGLER_TIMEOUT_S) if waits else (set(), set())
            if waiting and (all_new or not self._covers(materials)):
                await asyncio.wait(waiting, timeout=READY_TIMEOUT_S)
        finally:
            late = {name for name, task in waits.items() if task.cancel()}
        away = {}
        for name, task in waits.items():
            if name in late:
                reason = self._running[name].group.last_error
                away[name] = f"token {name}: its worker is not ready after {STRAGGLER_TIMEOUT_S:g} s: {reason}"
            elif (error := task.exception()) is not None:
                if not isinstance(error, WorkerFailed):
                    raise error
                away[name] = str(error)
        return away

    def _covers(self, materials: Mapping[str, Material]) -> bool:
        ready = self._keys().keys()
        return not self._failures() and all(ready & set(material.config.tokens) for material in materials.values())

    def _failures(self) -> dict[str, str]:
        failures = {name: running.group.failure for name, running in self._running.items()}
        return {name: failure for name, failure in failures.items() if failure is not None}

    def _keys(self) -> dict[str, tuple[KeyInfo, ...]]:
        """Return what tokens have announced, of those that have been open."""
        return {name: running.group.keys for name, running in self._running.items() if running.group.was_ready}

    def _token_problem(self, name: str, failure: str) -> Problem:
        key = {TokenKind.SOFT: "path", TokenKind.PKCS11: "module", TokenKind.AWSKMS: "region"}[self._configs[name].kind]
        return self._configs[name].origin.problem(key, f"expected a token that opens; got: {failure}")

    @property
    def endpoints(self) -> tuple[TokenEndpoints, ...]:
        """Where the workers listen, for the proxy workers' pools."""
        return tuple(running.group.endpoints for running in self._running.values())

    @property
    def metrics_fds(self) -> tuple[int, ...]:
        """The workers' metric stores."""
        return tuple(fd for running in self._running.values() for fd in running.group.metric_fds)


def _keys_used(config: Config, token: str) -> tuple[str, ...]:
    """Return the keys that certificates have on this token: its workers are to sign with no other."""
    return tuple(dict.fromkeys(certificate.key for certificate in config.certificates if token in certificate.tokens))


def _group(token: Token, directory: Path, config: Config) -> WorkerGroup:
    try:
        return WorkerGroup(
            token,
            str(directory),
            log_level=config.log.level.value,
            log_format=config.log.format.value,
            open_timeout_s=config.hsm.open_timeout_s,
            hang_timeout_s=config.hang_timeout_s,
            run_as=identity(config.hsm_user, "hsm_user"),
            client=identity(config.user, "user"),
            withheld=_pins_of_others(config, token.name),
        )
    except TokenConfigError as error:
        raise StartupError(f"runtime_dir: {error}") from None
    except OSError as error:
        raise StartupError(f"runtime_dir: cannot use {directory}: {error.strerror}") from None


def _pins_of_others(config: Config, token: str) -> set[str]:
    """Return the variables with PINs that are not this token's."""
    others = {other.pin_env for other in config.hsm.tokens if other.pin_env is not None}
    return others.difference(own.pin_env for own in config.hsm.tokens if own.name == token)


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
