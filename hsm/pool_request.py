"""A signature on its way through the pool: what is asked, with which key, and what comes back."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import assert_never

from hsm.errors import (
    DeadlineExceeded,
    HsmError,
    KeyNotFound,
    Overloaded,
    PolicyRejected,
    SignerUnavailable,
    TokenError,
)
from hsm.keyreference import KeyReference
from hsm.messages import SignatureScheme, SignReply, Status

if TYPE_CHECKING:
    from hsm.pool_connection import WorkerConnection
    from hsm.pool_token import PoolToken

RESULTS: dict[type[HsmError], str] = {
    DeadlineExceeded: "expired",
    KeyNotFound: "no_key",
    Overloaded: "overloaded",
    PolicyRejected: "policy",
    SignerUnavailable: "unavailable",
    TokenError: "error",
}
"""Values of the label `result` of what got no signature."""
CANCELLED = "cancelled"
"""The same, of what was no longer wanted."""


@dataclass(frozen=True, slots=True)
class Signature:
    """A signature and where the time went."""

    value: bytes
    """As TLS wants it: ECDSA as a DER SEQUENCE, RSA as an octet string."""
    token: str
    queue_s: float
    """From submit() to the answer, less `sign_s`: waiting in the pool, in sockets and in the worker."""
    sign_s: float
    """The token's own time, as its worker measured it."""


class SigningKey:
    """A key as a user of the pool names it: which tokens to ask and for what. Made by SignerPool.key()."""

    __slots__ = ("public_key", "reference", "text", "tokens", "waiting")

    def __init__(self, text: str, tokens: tuple[PoolToken, ...], public_key: bytes | None) -> None:
        self.text = text
        self.reference = KeyReference.parse(text)
        self.tokens = tokens
        self.public_key = public_key
        self.waiting: deque[Request] = deque()
        """Requests for which no worker had room yet: the WaitingRoom's."""

    def __repr__(self) -> str:
        return f"<SigningKey {self.text!r} on {', '.join(token.name for token in self.tokens)}>"


class Request:
    """One signature asked for. It may be in flight to two workers at a time, and to several one after the other."""

    __slots__ = (
        "deadline_ns",
        "future",
        "hedged",
        "hedged_to",
        "in_flight",
        "key",
        "last_error",
        "last_token",
        "live",
        "pinned",
        "scheme",
        "sends",
        "submitted_ns",
        "tbs",
        "tried",
    )

    def __init__(
        self,
        future: asyncio.Future[Signature],
        key: SigningKey,
        scheme: SignatureScheme,
        tbs: bytes,
        submitted_ns: int,
        deadline_ns: int,
    ) -> None:
        self.future = future
        self.key = key
        self.scheme = scheme
        self.tbs = tbs
        self.submitted_ns = submitted_ns
        self.deadline_ns = deadline_ns
        self.live = True
        """Not yet answered, expired or forgotten."""
        self.in_flight = 0
        """Workers that have it and have not answered."""
        self.sends = 0
        self.hedged = False
        """Hedged, or refused a hedge: once is enough."""
        self.hedged_to: WorkerConnection | None = None
        self.pinned = False
        """A canary: it is about one token, so no other is asked instead."""
        self.tried: tuple[PoolToken, ...] = ()
        """Tokens that answered with an error: none is asked twice."""
        self.last_error: HsmError | None = None
        self.last_token: PoolToken | None = None
        """The one it was last sent to."""


def error_of(reply: SignReply) -> tuple[HsmError, bool]:
    """Return the error an answer stands for, and whether it is the token that is at fault."""
    reason = "".join(char if char.isprintable() else "?" for char in reply.payload[:200].decode("ascii", "replace"))
    match reply.status:
        case Status.RETRY:
            return _token_error(reason, retryable=True), True
        case Status.ERROR:
            return _token_error(reason, retryable=False), False
        case Status.NO_KEY:
            return KeyNotFound("the token no longer has the key"), True
        case Status.BUSY:
            return Overloaded("the token's worker has too much in hand"), False
        case Status.POLICY:
            return PolicyRejected(reason), False
        case Status.EXPIRED:
            return DeadlineExceeded("the token was not done before the deadline"), False
        case Status.OK:
            raise ValueError("a signature is no error")
        case _:
            assert_never(reply.status)


def _token_error(reason: str, *, retryable: bool) -> TokenError:
    code, _, message = reason.partition(": ")
    return TokenError(code, message, retryable=retryable)
