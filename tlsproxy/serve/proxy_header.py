"""The PROXY protocol on a client's connection: what the proxy before us says of it, and what we say to a server."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from tlsproxy.config import ProxyProtocol
from tlsproxy.proxy_protocol import (
    ClientShown,
    Endpoints,
    ProxyProtocolError,
    TlsDetails,
    own_header,
    parse_header,
    v1_header,
    v2_header,
)
from tlsproxy.tls.events import HandshakeComplete

if TYPE_CHECKING:
    from tlsproxy.serve.client import ClientConnection

_log = logging.getLogger("tlsproxy.connection")


class ProxyHeaderReader:
    """The part of a ClientConnection that it needs until the proxy before us has said who the client is."""

    __slots__ = ("_client", "_received")

    def __init__(self, client: ClientConnection) -> None:
        self._client = client
        self._received = b""

    def data_received(self, data: bytes) -> None:
        """Take what the proxy has sent; what comes after its header is the client's."""
        self._received += data
        client = self._client
        try:
            header = parse_header(self._received)
        except ProxyProtocolError as error:
            extra = {"listener": client.runtime.name, "peer": client.peer.host, "reason": str(error)}
            _log.warning("bad PROXY protocol header", extra=extra)
            client.runtime.metrics.count_refused("proxy_protocol")
            client.refuse()
            return
        if header is not None:
            client.identified(header.endpoints, self._received[header.size :])


def header_for_server(version: ProxyProtocol, endpoints: Endpoints | None, tls: HandshakeComplete | None) -> bytes:
    """Return what tells a server who the client is; without `endpoints`, that the connection is our own."""
    if endpoints is None:
        return own_header(version)
    if version is ProxyProtocol.V1:
        return v1_header(endpoints)
    if tls is None:
        return v2_header(endpoints, None)
    details = TlsDetails(tls.tls_version, tls.cipher, tls.alpn, tls.server_name)
    certificate = tls.client_certificate
    if certificate is not None:
        shown = ClientShown.IN_THIS_SESSION if tls.resumed else ClientShown.ON_THIS_CONNECTION
        details = replace(details, client_shown=shown, client_common_name=certificate.common_name)
    return v2_header(endpoints, details)
