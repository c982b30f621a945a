"""One TLS connection, server side, without I/O: bytes in, events and bytes out (TLS 1.2 and 1.3: RFC 5246, RFC 8446).

The caller feeds what it received and acts on the events; after any call it writes what data_to_send() returns. The
private-key signature is the caller's part: SignatureNeeded suspends the handshake until it delivers one.

    HANDSHAKING <-> SUSPENDED          SignatureNeeded, provide_signature
    HANDSHAKING  -> ESTABLISHED        HandshakeComplete
    ESTABLISHED  -> CLOSING -> CLOSED  close(); CloseNotify
    any          -> CLOSED             HandshakeFailed, ConnectionFailed
    any          -> ABORTED            abort()
"""

from __future__ import annotations

import enum
import hashlib
from time import monotonic
from typing import TYPE_CHECKING, Final

from hsm.messages import SignatureScheme
from tlsproxy.tls import _openssl
from tlsproxy.tls.certificates import Certificate
from tlsproxy.tls.client_certificates import ClientCertificate, ClientResult
from tlsproxy.tls.errors import (
    ConnectionClosedError,
    HandshakeIncompleteError,
    NoSignatureWantedError,
    SignatureLengthError,
    UsedAfterAbortError,
)
from tlsproxy.tls.events import (
    ClientHelloReceived,
    CloseNotify,
    ConnectionFailed,
    Event,
    HandshakeComplete,
    HandshakeFailed,
    PlaintextReceived,
    SignatureNeeded,
)

if TYPE_CHECKING:
    from tlsproxy.tls.context import TlsContext

MAX_HANDSHAKE_BYTES = 64 * 1024
"""What a client may send before its handshake is complete; also what is kept for it while a signature is made."""

_JOIN_BYTES = 16 * 1024
"""Pieces below a TLS record's size are encrypted together: a record costs more than the copy."""

_SCHEMES: Final = {scheme.value: scheme for scheme in SignatureScheme}
_RSA_SCHEMES: Final = frozenset(scheme for scheme in SignatureScheme if scheme.label.startswith("rsa"))
_CLIENT_LEFT = "the client closed the connection"
_CLIENT_RESULTS: Final = {
    _openssl.CLIENT_WITHOUT_CERTIFICATE: ClientResult.MISSING,
    _openssl.CLIENT_REFUSED: ClientResult.REFUSED,
}

live_jobs = _openssl.live_jobs
"""Return the number of handshakes suspended in this process."""


class State(enum.Enum):
    """Where a connection is. See the module's docstring."""

    HANDSHAKING = "handshaking"
    SUSPENDED = "suspended"
    ESTABLISHED = "established"
    CLOSING = "closing"
    CLOSED = "closed"
    ABORTED = "aborted"


class TlsConnection:
    """Made by TlsContext.connection(). Belongs to one thread."""

    __slots__ = (
        "_certificate",
        "_client_hello",
        "_context",
        "_handshake_bytes",
        "_peer_closed",
        "_scheme",
        "_signature_max",
        "_ssl",
        "_state",
        "choice_s",
    )

    def __init__(self, context: TlsContext) -> None:
        self._context = context
        self._certificate: Certificate = context.certificates[0]
        self._client_hello: ClientHelloReceived | None = None
        self._scheme: SignatureScheme | None = None
        self._signature_max = 0
        self._ssl = _openssl.Connection(context.openssl_context(self._certificate))
        self._state = State.HANDSHAKING
        self._handshake_bytes = 0
        self._peer_closed = False
        self.choice_s = 0.0
        """Seconds that the choice of the certificate took."""

    @property
    def state(self) -> State:
        """Where the connection is."""
        return self._state

    @property
    def bytes_to_send(self) -> int:
        """The length of what data_to_send() would return."""
        return self._ssl.output_bytes

    def receive_data(self, data: bytes) -> list[Event]:
        """Take ciphertext from the client. What comes after the client's end of data is ignored.

        Raises UsedAfterAbortError.
        """
        state = self._state
        if state is State.ESTABLISHED or state is State.CLOSING:
            if self._peer_closed:
                return []
            self._ssl.feed(data)
            events: list[Event] = []
            self._decrypt(events)
            return events
        if state is State.ABORTED:
            raise UsedAfterAbortError("receive_data after abort")
        if state is State.CLOSED:
            return []
        self._handshake_bytes += len(data)
        if state is State.SUSPENDED:
            if self._ssl.input_bytes + len(data) > MAX_HANDSHAKE_BYTES:
                self._ssl.sign(None)
                return [self._handshake_failed(f"more than {MAX_HANDSHAKE_BYTES} bytes before the server's answer")]
            self._ssl.feed(data)
            return []
        self._ssl.feed(data)
        return self._advance(self._ssl.handshake())

    def receive_eof(self) -> list[Event]:
        """Take note that the client's bytes have ended. Without a close_notify before, that is a failure.

        Raises UsedAfterAbortError.
        """
        if self._state is State.ABORTED:
            raise UsedAfterAbortError("receive_eof after abort")
        if self._state is State.CLOSED or self._peer_closed:
            return []
        if self._state in (State.HANDSHAKING, State.SUSPENDED):
            return [self._handshake_failed(_CLIENT_LEFT)]
        return [self._connection_failed("the client closed the connection without close_notify")]

    def provide_signature(self, signature: bytes) -> list[Event]:
        """Resume the handshake with the signature that SignatureNeeded asked for (ECDSA: DER, RFC 3279).

        It is not verified here; a wrong one is what the client will find. Raises NoSignatureWantedError,
        SignatureLengthError, UsedAfterAbortError.
        """
        self._require_suspended()
        size, longest = len(signature), self._signature_max
        # An RSA signature is as long as its modulus; ECDSA's encoding has no fixed length.
        shortest = longest if self._scheme in _RSA_SCHEMES else 1
        if not shortest <= size <= longest:
            expected = f"{longest} bytes" if shortest == longest else f"{longest} bytes at most"
            raise SignatureLengthError(f"a signature of {expected} expected; got {size}")
        self._state = State.HANDSHAKING
        return self._advance(self._ssl.sign(signature))

    def fail_signature(self, reason: str) -> list[Event]:
        """End a suspended handshake for want of a signature, with the alert internal_error.

        Raises NoSignatureWantedError, UsedAfterAbortError.
        """
        self._require_suspended()
        self._ssl.sign(None)
        return [self._handshake_failed(reason)]

    def send(self, *pieces: bytes) -> None:
        """Encrypt `pieces`, one after the other.

        Raises HandshakeIncompleteError, ConnectionClosedError, UsedAfterAbortError.
        """
        if self._state is not State.ESTABLISHED:
            self._require_established("send")
            raise ConnectionClosedError("send after close")
        small: list[bytes] = []
        ok = True
        for piece in pieces:
            if len(piece) < _JOIN_BYTES:
                small.append(piece)
                continue
            if small:
                ok = self._ssl.write(b"".join(small)) == _openssl.OK and ok
                small.clear()
            ok = self._ssl.write(piece) == _openssl.OK and ok
        if small:
            ok = self._ssl.write(small[0] if len(small) == 1 else b"".join(small)) == _openssl.OK and ok
        if not ok:
            self._end(State.CLOSED)
            raise ConnectionClosedError(f"encryption failed: {self._ssl.reason}")

    def data_to_send(self) -> bytes:
        """Take the ciphertext for the client: empty when there is none."""
        return self._ssl.take_output()

    def close(self) -> None:
        """Send close_notify. The client's data is still received, up to its own close_notify. May be called again.

        Raises HandshakeIncompleteError, UsedAfterAbortError.
        """
        self._require_established("close")
        if self._state is not State.ESTABLISHED:
            return
        self._ssl.close()
        if self._peer_closed:
            self._end(State.CLOSED)
        else:
            self._state = State.CLOSING

    def abort(self) -> None:
        """Give up at once: end a suspended handshake, drop what was not sent, free memory. May be called again."""
        self._end(State.ABORTED)
        self._ssl.take_output()

    def _advance(self, status: int) -> list[Event]:
        """Act on the status of a handshake step, and go on as far as possible."""
        events: list[Event] = []
        if status == _openssl.WANT_CERTIFICATE:
            events.append(self._choose_certificate())
            status = self._ssl.handshake()
        if status == _openssl.WANT_SIGNATURE:
            events.append(self._suspend())
        elif status == _openssl.OK:
            events.append(self._complete())
            if self._ssl.input_bytes:
                self._decrypt(events)
        elif status == _openssl.FAILED:
            events.append(self._handshake_refused())
        elif status == _openssl.CLOSE_NOTIFY:
            events.append(self._handshake_failed(_CLIENT_LEFT))
        elif self._handshake_bytes > MAX_HANDSHAKE_BYTES:
            events.append(self._handshake_failed(f"more than {MAX_HANDSHAKE_BYTES} bytes without a complete handshake"))
        return events

    def _choose_certificate(self) -> ClientHelloReceived:
        started_s = monotonic()
        chosen = self._context.choose(*self._ssl.client_hello())
        self._client_hello = chosen
        self._certificate = chosen.certificate
        self._ssl.use_context(self._context.openssl_context(chosen.certificate))
        self.choice_s = monotonic() - started_s
        return chosen

    def _suspend(self) -> SignatureNeeded:
        scheme, handle, tbs, self._signature_max = self._ssl.signature_request()
        self._scheme = _SCHEMES[scheme]
        self._state = State.SUSPENDED
        return SignatureNeeded(self._context.certificates[handle], self._scheme, tbs)

    def _complete(self) -> HandshakeComplete:
        self._state = State.ESTABLISHED
        tls_version, cipher, group, alpn, resumed = self._ssl.session()
        server_name = None if self._client_hello is None else self._client_hello.server_name
        client_certificate = self._client_certificate() if self._context.asks_for_certificates else None
        return HandshakeComplete(
            tls_version, cipher, group, self._scheme, alpn, resumed, server_name, self._certificate, client_certificate
        )

    def _client_certificate(self) -> ClientCertificate | None:
        found = self._ssl.client_certificate()
        if found is None:
            return None
        der, subject, common_name = found
        return ClientCertificate(der, hashlib.sha256(der).hexdigest(), subject, common_name)

    def _decrypt(self, events: list[Event]) -> None:
        status = _openssl.BUFFER_FULL
        while status == _openssl.BUFFER_FULL:
            status, plaintext = self._ssl.read()
            if plaintext:
                events.append(PlaintextReceived(plaintext))
        if status == _openssl.CLOSE_NOTIFY:
            self._peer_closed = True
            events.append(CloseNotify())
            if self._state is State.CLOSING:
                self._end(State.CLOSED)
        elif status == _openssl.FAILED:
            events.append(self._connection_failed(self._ssl.reason or ""))

    def _handshake_refused(self) -> HandshakeFailed:
        """OpenSSL has ended the handshake."""
        reason = self._ssl.reason or ""
        client_result = _CLIENT_RESULTS.get(self._ssl.client_fault)
        self._end(State.CLOSED)
        if client_result is not None:
            reason = f"client certificate: {reason}"
        return HandshakeFailed(self._ssl.alert_sent, self._ssl.alert_received, reason, client_result)

    def _handshake_failed(self, reason: str) -> HandshakeFailed:
        self._end(State.CLOSED)
        return HandshakeFailed(self._ssl.alert_sent, self._ssl.alert_received, reason)

    def _connection_failed(self, reason: str) -> ConnectionFailed:
        self._end(State.CLOSED)
        return ConnectionFailed(self._ssl.alert_sent, self._ssl.alert_received, reason)

    def _end(self, state: State) -> None:
        self._state = state
        self._ssl.free()

    def _require_suspended(self) -> None:
        if self._state is State.ABORTED:
            raise UsedAfterAbortError("a signature after abort")
        if self._state is not State.SUSPENDED:
            raise NoSignatureWantedError(f"a suspended connection expected; it is {self._state.value}")

    def _require_established(self, what: str) -> None:
        if self._state is State.ABORTED:
            raise UsedAfterAbortError(f"{what} after abort")
        if self._state in (State.HANDSHAKING, State.SUSPENDED):
            raise HandshakeIncompleteError(f"{what} before the handshake is complete")
