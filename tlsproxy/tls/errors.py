"""Misuse of a TlsConnection: bugs of its caller, never the client's doing. Each has its own class."""

from __future__ import annotations

from tlsproxy.errors import TlsProxyError


class TlsUsageError(TlsProxyError):
    """Base of all. The connection is as it was before the call."""


class NoSignatureWantedError(TlsUsageError):
    """A signature, or its failure, was delivered to a connection that does not wait for one, or no longer does."""


class SignatureLengthError(TlsUsageError):
    """The signature has a length that no signature by that key has. The connection still waits for one."""


class HandshakeIncompleteError(TlsUsageError):
    """Data can be sent, and close_notify, only after HandshakeComplete; before, abort() is what ends a connection."""


class ConnectionClosedError(TlsUsageError):
    """The connection was closed, or has failed: nothing can be sent any more."""


class UsedAfterAbortError(TlsUsageError):
    """The connection was used after abort()."""
