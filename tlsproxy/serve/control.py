"""What passes between the supervisor and a proxy worker, over one socket pair.

Down go pickled commands: the worker trusts the supervisor, which is its parent. Up go short JSON lines: a proxy worker
faces the network, so what it says is parsed as if an attacker had written it.
"""

from __future__ import annotations

import enum
import json
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from hsm.pool import TokenEndpoints
from tlsproxy.config import Address, Config
from tlsproxy.serve.anatomy import SlowHandshake
from tlsproxy.tls.client_authorities import ClientAuthorities
from tlsproxy.tls.context import TicketKey

MAX_STATUS_BYTES = 4096
HEARTBEAT_S = 1.0
MAX_LINES_PER_S = 5000
"""One that sends more would keep the supervisor from its other work."""
_LENGTH = struct.Struct("<I")
_SLOW_HANDSHAKE = "slow_handshake"


@dataclass(frozen=True, slots=True)
class ProxyWorkerSpec:
    """The first command: all that a proxy worker needs to serve."""

    index: int
    config: Config
    chains: Mapping[str, bytes] = field(repr=False)
    """PEM text by certificate name: read by the supervisor, so that all workers serve the same."""
    client_authorities: Mapping[Address, ClientAuthorities]
    """By the address of the listener that verifies its clients by them."""
    listener_fds: tuple[tuple[int, ...], ...]
    """For each of `config.listeners` the listening sockets to accept on, inherited."""
    tokens: tuple[TokenEndpoints, ...]
    metrics_fd: int
    run_as: tuple[int, ...]
    """The user to become: uid, gid, supplementary gids; empty: stay who one is."""
    ticket_keys: tuple[TicketKey, ...]
    """The first encrypts, all decrypt."""


@dataclass(frozen=True, slots=True)
class NewTicketKeys:
    """Use these session ticket keys from now on."""

    keys: tuple[TicketKey, ...]


@dataclass(frozen=True, slots=True)
class Drain:
    """Stop accepting, finish what is under way within `deadline_s` seconds, exit."""

    deadline_s: float


Command = ProxyWorkerSpec | NewTicketKeys | Drain


def encode_command(command: Command) -> bytes:
    """Return the command's frame."""
    body = pickle.dumps(command)
    return _LENGTH.pack(len(body)) + body


def decode_commands(buffer: bytearray) -> list[Command]:
    """Take every whole command from the start of `buffer`."""
    commands: list[Command] = []
    while len(buffer) >= _LENGTH.size:
        (length,) = _LENGTH.unpack_from(buffer)
        end = _LENGTH.size + length
        if len(buffer) < end:
            break
        commands.append(pickle.loads(bytes(buffer[_LENGTH.size : end])))  # noqa: S301  # from the parent process
        del buffer[:end]
    return commands


class State(str, enum.Enum):
    """What a proxy worker says of itself."""

    READY = "ready"
    """It accepts connections. Said again each HEARTBEAT_S, as a sign of life."""
    DRAINING = "draining"
    """It accepts no more, lets its connections finish and ends."""
    FAILED = "failed"
    """It cannot serve and ends."""


@dataclass(frozen=True, slots=True)
class Status:
    """One line from a proxy worker."""

    state: State
    error: str = ""

    def to_line(self) -> bytes:
        """Return the JSON line."""
        return json.dumps({"state": self.state.value, "error": self.error[:1024]}).encode() + b"\n"


def slow_handshake_line(handshake: SlowHandshake) -> bytes:
    """Return the JSON line that tells of one of the slowest handshakes."""
    return json.dumps({_SLOW_HANDSHAKE: handshake.to_document()}).encode() + b"\n"


def parse_line(line: bytes) -> Status | SlowHandshake:
    """Return what a proxy worker says. Raises ValueError for anything that one of this version doesn't send."""
    try:
        document = json.loads(line)
    except RecursionError:
        raise ValueError("expected a flat JSON object") from None
    if isinstance(document, dict) and _SLOW_HANDSHAKE in document:
        return SlowHandshake.from_document(document[_SLOW_HANDSHAKE])
    if not isinstance(document, dict) or not isinstance(document.get("error"), str):
        raise ValueError("expected a JSON object with the keys state and error")
    return Status(State(document.get("state")), document["error"])
