"""The proxy's errors. Each carries one clear line for an operator; none carries a secret or raw bytes of a peer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TlsProxyError(Exception):
    """Base of all."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a configuration, and where."""

    file: str
    line: int
    column: int
    path: str
    """Dotted path of the key: `listeners[0].tls.profile`."""
    message: str
    """`expected ...; got ...`."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.path}: {self.message}"


class ConfigError(TlsProxyError):
    """The configuration can't be used. Holds every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


class HttpError(TlsProxyError):
    """A request that is answered by the proxy itself. `reason` is a metric label: short, from a fixed set."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason


class UpstreamError(TlsProxyError):
    """No answer from an upstream. `status` is what the client is told (502, 503, 504), `reason` a metric label."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason


class StartupError(TlsProxyError):
    """The proxy can't start for a reason outside its configuration file: a port in use, a token that won't open."""
