"""What a worker process is told when it starts: one line of JSON on an inherited descriptor.

Never on its command line or in its environment, which others may read. The descriptor stays open: when the far end
closes, the parent is gone and the worker ends.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass
from typing import Literal

from hsm.keyreference import KeyReference
from hsm.logs import LogFormat, LogLevel

SPEC_FD = 3
"""The descriptor `python -m hsm.worker` reads its WorkerSpec from, unless told another as its one argument."""
MAX_SPEC_BYTES = 1 << 16


class WorkerSpecError(ValueError):
    """The document is not a sound WorkerSpec. The message says which field, what was expected and what was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker of one token. Raises WorkerSpecError when fields are out of range or do not go together."""

    token: str
    """The token's configured name, as in metrics."""
    kind: Literal["soft", "pkcs11", "awskms"]
    path: str | None = None
    """The soft token's file."""
    pin_file: str | None = None
    pin_env: str | None = None
    """Where the PIN is: exactly one of a file and an environment variable's name; AWS KMS has none."""
    module: str | None = None
    """The PKCS#11 library."""
    token_label: str | None = None
    token_serial: str | None = None
    slot: int | None = None
    """At least one of the three finds the PKCS#11 token."""
    region: str | None = None
    endpoint_url: str | None = None
    """AWS KMS: where it is; without a URL, the region's own endpoint."""
    sessions: int = 1
    """PKCS#11 sessions or connections to AWS KMS, each signing one at a time."""
    keys: tuple[str, ...] = ()
    """The keys the worker may sign with. PKCS#11: labels or pkcs11: URIs; none means all that can serve TLS. AWS KMS:
    key ids, ARNs or aliases."""
    listen_fd: int
    """A listening Unix stream socket."""
    status_fd: int
    """Where the worker writes its status: a line of JSON each time."""
    metrics_fd: int | None = None
    """The shared memory of a MetricStore."""
    allowed_uid: int
    """Clients must have this uid (SO_PEERCRED) or the worker's own."""
    run_as: tuple[int, ...] = ()
    """A worker started by root becomes this user: uid, gid, supplementary gids. Empty: it stays who it is."""
    max_in_flight: int = 128
    """Requests one connection may have unanswered: the window of the worker's Hello."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    hang_limit_s: float = 30.0
    """The worker ends itself when one signature takes longer: only a new process can shake off a hung token."""

    def __post_init__(self) -> None:
        for field, low, high in (
            ("sessions", 1, 1024),
            ("listen_fd", 0, 1 << 20),
            ("status_fd", 0, 1 << 20),
            ("metrics_fd", 0, 1 << 20),
            ("allowed_uid", 0, (1 << 32) - 1),
            ("max_in_flight", 1, 1024),
            ("hang_limit_s", 0.1, 3600.0),
        ):
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise WorkerSpecError(f"{field}: expected {low} to {high}; got {value}")
        pins = (self.pin_file is not None) + (self.pin_env is not None)
        if pins != (self.kind != "awskms"):
            raise WorkerSpecError(
                f"pin_file, pin_env: expected {'none' if self.kind == 'awskms' else 'exactly one'} of them"
            )
        if self.kind == "awskms" and self.region is None:
            raise WorkerSpecError("region: expected an AWS region; got nothing")
        if self.kind == "soft" and self.path is None:
            raise WorkerSpecError("path: expected the token's file; got nothing")
        if self.kind == "pkcs11":
            if self.module is None:
                raise WorkerSpecError("module: expected the PKCS#11 library; got nothing")
            if self.token_label is None and self.token_serial is None and self.slot is None:
                raise WorkerSpecError("token_label, token_serial, slot: expected at least one of them")
            try:
                for reference in self.keys:
                    KeyReference.parse(reference)
            except ValueError as error:
                raise WorkerSpecError(f"keys: {error}") from None

    def to_json(self) -> str:
        """Return the document, without the newline that ends it on the descriptor."""
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v is not None})

    @classmethod
    def from_json(cls, text: str | bytes) -> WorkerSpec:
        """Return the WorkerSpec in `text`. Raises WorkerSpecError: wrong types and unknown fields are errors."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise WorkerSpecError(f"expected JSON; {error}") from None
        if not isinstance(document, dict):
            raise WorkerSpecError(f"expected a JSON object; got {type(document).__name__}")
        hints = typing.get_type_hints(cls)
        for name, value in document.items():
            if name not in hints:
                raise WorkerSpecError(f"{name}: unknown field")
            if not _is_of_type(value, hints[name]):
                raise WorkerSpecError(f"{name}: expected {_type_name(hints[name])}; got {value!r}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.name not in document
        ]
        if missing:
            raise WorkerSpecError(f"{missing[0]}: expected a value; got nothing")
        for name in ("keys", "run_as"):
            if name in document:
                document[name] = tuple(document[name])
        return cls(**document)


def _is_of_type(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_of_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of_type(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    assert isinstance(hint, type)
    return isinstance(value, hint) and not isinstance(value, bool)


def _type_name(hint: object) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    return str(getattr(hint, "__name__", hint))
