"""Where a handshake's time goes, and the slowest handshakes of late: kept where they happen, told to the supervisor."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, Final, NamedTuple

SLOWEST: Final = 100
"""How many handshakes are kept."""
WINDOW_S: Final = 300.0
"""After so long they make room for others, and after twice that they are forgotten."""
_MAX_TEXT_LENGTH = 128
_MAX_SECONDS = 1e11


class HandshakePhases(NamedTuple):
    """Where a full handshake's time went, in seconds; the parts add up to its duration."""

    client_hello_s: float
    """Reading the ClientHello and preparing the answer, up to the request for a signature."""
    certificate_s: float
    """Choosing the certificate."""
    queue_s: float
    """Waiting for the HSM: in the pool, in sockets and in the worker."""
    sign_s: float
    """In the HSM."""
    client_s: float
    """Waiting for the client: for its ClientHello, and for its answer to the server's."""
    finish_s: float
    """The rest: sending the answer, and checking the client's."""


PHASES: Final = tuple(name.removesuffix("_s") for name in HandshakePhases._fields)
"""The values of the label `phase`."""


@dataclass(frozen=True, slots=True)
class SlowHandshake:
    """A full handshake that succeeded."""

    ended_s: float
    """Seconds since the epoch."""
    listener: str
    tls_version: str
    cipher: str
    key_type: str
    token: str
    scheme: str
    duration_s: float
    phases: HandshakePhases

    def to_document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        document = {name: getattr(self, name) for name in self.__slots__}
        return document | {"phases": self.phases._asdict()}

    @classmethod
    def from_document(cls, document: object) -> SlowHandshake:
        """Return what `to_document` made. Raises ValueError for anything else: it comes from a proxy worker."""
        if not isinstance(document, dict) or document.keys() != set(cls.__slots__):
            raise ValueError("expected a handshake with all of its fields")
        phases = document["phases"]
        if not isinstance(phases, dict) or phases.keys() != set(HandshakePhases._fields):
            raise ValueError("expected a handshake with all of its phases")
        return cls(
            min(_seconds(document["ended_s"]), time()),
            _text(document["listener"]),
            _text(document["tls_version"]),
            _text(document["cipher"]),
            _text(document["key_type"]),
            _text(document["token"]),
            _text(document["scheme"]),
            _seconds(document["duration_s"]),
            HandshakePhases(*(_seconds(phases[name]) for name in HandshakePhases._fields)),
        )


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_SECONDS:
        raise ValueError("expected a number of seconds")
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT_LENGTH or not value.isprintable():
        raise ValueError(f"expected at most {_MAX_TEXT_LENGTH} printable characters")
    return value


class _Kept(NamedTuple):
    duration_s: float
    number: int
    handshake: SlowHandshake


class SlowestHandshakes:
    """The SLOWEST slowest handshakes added of late, in memory of fixed size: two heaps, one for each WINDOW_S."""

    __slots__ = ("_added", "_current", "_previous", "_reported", "_rotate_s", "floor_s")

    def __init__(self) -> None:
        self._current: list[_Kept] = []
        self._previous: list[_Kept] = []
        self._rotate_s = monotonic() + WINDOW_S
        self._added = 0
        self._reported = 0
        self.floor_s = 0.0
        """A handshake that took no longer need not be added."""

    def add(self, handshake: SlowHandshake) -> None:
        """Keep `handshake`, if it is one of the slowest."""
        self._added += 1
        kept = _Kept(handshake.duration_s, self._added, handshake)
        if len(self._current) < SLOWEST:
            heapq.heappush(self._current, kept)
        else:
            heapq.heappushpop(self._current, kept)
        self.floor_s = self._current[0].duration_s if len(self._current) == SLOWEST else 0.0

    def rotate(self) -> None:
        """Begin a new window when it is time; to be called now and then."""
        if monotonic() >= self._rotate_s:
            self._rotate_s = monotonic() + WINDOW_S
            self._previous, self._current = self._current, []
            self.floor_s = 0.0

    def take_new(self) -> list[SlowHandshake]:
        """Return those kept that no earlier call has returned."""
        new = [kept.handshake for kept in (*self._previous, *self._current) if kept.number > self._reported]
        self._reported = self._added
        return new

    def __iter__(self) -> Iterator[SlowHandshake]:
        return (kept.handshake for kept in (*self._previous, *self._current))


def slowest(collections: Iterable[SlowestHandshakes]) -> list[SlowHandshake]:
    """Return the SLOWEST of all `collections`, the slowest first."""
    handshakes = [handshake for collection in collections for handshake in collection]
    return heapq.nlargest(SLOWEST, handshakes, key=lambda handshake: handshake.duration_s)
