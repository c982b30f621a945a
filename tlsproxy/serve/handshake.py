"""A client's handshake while it is under way: it asks for the signature, and takes note of where the time went."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from hsm.logs import EventLog
from hsm.pool_request import Signature
from tlsproxy.serve.anatomy import HandshakePhases
from tlsproxy.serve.counting import sign_failure_result
from tlsproxy.tls.engine import TlsConnection
from tlsproxy.tls.errors import SignatureLengthError
from tlsproxy.tls.events import Event, HandshakeComplete, HandshakeFailed, SignatureNeeded

if TYPE_CHECKING:
    from tlsproxy.serve.client import ClientConnection

HANDSHAKE_LOG = "tlsproxy.handshake"
_completed_log = EventLog(HANDSHAKE_LOG, "handshake")
_failed_log = EventLog(HANDSHAKE_LOG, "handshake failed")


class HandshakeSummary(NamedTuple):
    """A handshake that succeeded."""

    started_s: float
    """Monotonic: when the connection was accepted or, behind a PROXY protocol header, when that was read."""
    duration_s: float
    complete: HandshakeComplete
    phases: HandshakePhases | None
    """None, as `token`, when it was resumed: nothing was signed."""
    token: str | None
    """The name of the token that signed."""
    signature_requested_s: float
    """Monotonic; 0 when it was resumed."""


class Handshake:
    """The part of a ClientConnection that it needs no longer once established."""

    __slots__ = (
        "_client",
        "_client_hello_s",
        "_client_wait_s",
        "_idle_since_s",
        "_sign_failure",
        "_signature",
        "_signature_requested_s",
        "_signed",
        "_started_s",
        "_tls",
    )

    def __init__(self, client: ClientConnection, tls: TlsConnection, now_s: float) -> None:
        """Begin at `now_s`, monotonic."""
        self._client = client
        self._tls = tls
        self._started_s = self._idle_since_s = now_s
        self._client_hello_s = 0.0
        self._client_wait_s = 0.0
        self._signature: asyncio.Future[Signature] | None = None
        self._signature_requested_s = 0.0
        self._signed: Signature | None = None
        self._sign_failure = ""

    def data_received(self, data: bytes) -> None:
        """Take what the client has sent."""
        if self._signature is None:
            self._client_wait_s += monotonic() - self._idle_since_s
        self._client.act_on(self._tls.receive_data(data))
        self._idle_since_s = monotonic()

    def act_on(self, event: Event) -> None:
        """Do what an event asks for."""
        if type(event) is SignatureNeeded:
            self._ask_for_signature(event)
        elif type(event) is HandshakeComplete:
            self._complete(event)
        elif type(event) is HandshakeFailed:
            if event.client_result is not None:
                self._client.runtime.metrics.count_client_certificate(event.client_result)
            result = "tls_alert" if event.alert_received is not None else self._sign_failure or "protocol_error"
            self._client.handshake_failed(result, event.reason)

    def end(self, result: str, reason: str) -> None:
        """Give up, and take note of it: `result` is the metric's label, `reason` for people."""
        signature = self._signature
        if signature is not None:
            self._signature = None
            signature.cancel()
        runtime = self._client.runtime
        runtime.metrics.count_failed_handshake(result)
        runtime.handshake_ended()
        if _failed_log.takes():
            _failed_log.write(
                {
                    "listener": runtime.name,
                    "client": self._client.client_ip,
                    "result": result,
                    "reason": reason,
                    "duration_s": round(monotonic() - self._started_s, 6),
                }
            )

    def _ask_for_signature(self, event: SignatureNeeded) -> None:
        now_s = self._signature_requested_s = monotonic()
        self._client_hello_s = now_s - self._started_s - self._client_wait_s
        runtime = self._client.runtime
        key = runtime.signing_keys[event.certificate.name]
        self._signature = runtime.pool.submit(key, event.scheme, event.tbs)
        self._signature.add_done_callback(self._on_signature)

    def _on_signature(self, future: asyncio.Future[Signature]) -> None:
        if self._signature is not future:
            # The handshake has ended meanwhile.
            return
        self._signature = None
        error = future.exception()
        if error is None:
            self._signed = future.result()
            try:
                events = self._tls.provide_signature(self._signed.value)
            except SignatureLengthError:
                self._sign_failure = "hsm_unavailable"
                events = self._tls.fail_signature("the token's signature has a length that its key can't make")
        else:
            self._sign_failure = sign_failure_result(error)
            events = self._tls.fail_signature(str(error))
        self._client.act_on(events)
        self._idle_since_s = monotonic()

    def _complete(self, event: HandshakeComplete) -> None:
        duration_s = monotonic() - self._started_s
        runtime = self._client.runtime
        runtime.metrics.observe_handshake(event, duration_s)
        signed = self._signed
        phases = token = None
        if signed is not None:
            phases = self._phases(duration_s, signed)
            token = signed.token
            runtime.metrics.observe_phases(event, duration_s, phases, token)
        summary = HandshakeSummary(self._started_s, duration_s, event, phases, token, self._signature_requested_s)
        if _completed_log.takes():
            self._log(summary)
        runtime.handshake_ended()
        self._client.handshake_completed(summary)

    def _phases(self, duration_s: float, signed: Signature) -> HandshakePhases:
        choice_s = self._tls.choice_s
        finish_s = duration_s - self._client_hello_s - signed.queue_s - signed.sign_s - self._client_wait_s
        return HandshakePhases(
            self._client_hello_s - choice_s,
            choice_s,
            signed.queue_s,
            signed.sign_s,
            self._client_wait_s,
            # The token's own time is rounded up to a microsecond: what is left can be less than nothing.
            max(finish_s, 0.0),
        )

    def _log(self, summary: HandshakeSummary) -> None:
        complete = summary.complete
        fields = {
            "listener": self._client.runtime.name,
            "client": self._client.client_ip,
            "result": "ok",
            "server_name": complete.server_name,
            "certificate": complete.certificate.name,
            "tls_version": complete.tls_version,
            "cipher": complete.cipher,
            "group": complete.group,
            "scheme": None if complete.scheme is None else complete.scheme.label,
            "resumed": complete.resumed,
            "token": summary.token,
            "duration_s": round(summary.duration_s, 6),
        }
        if complete.client_certificate is not None:
            fields["client_subject"] = complete.client_certificate.subject
            fields["client_fingerprint"] = complete.client_certificate.fingerprint
        if summary.phases is not None:
            fields.update({name: round(seconds, 6) for name, seconds in summary.phases._asdict().items()})
        _completed_log.write(fields)
