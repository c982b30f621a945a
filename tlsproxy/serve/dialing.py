"""How a connection to an upstream's server is opened: TCP or a Unix socket, with TLS or without."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from tlsproxy.config import Address, UnixAddress, UpstreamTlsConfig
from tlsproxy.errors import UpstreamError
from tlsproxy.serve.servers import Server


class Dialer:
    """Opens the connections of one upstream."""

    def __init__(self, tls: UpstreamTlsConfig | None, timeout_s: float) -> None:
        """`timeout_s` is for all of it, the TLS handshake included."""
        self._timeout_s = timeout_s
        self._tls = tls
        self._context = None if tls is None else _client_context(tls)

    async def open(self, factory: Callable[[], asyncio.Protocol], server: Server) -> None:
        """Connect `factory`'s protocol to `server`. Raises UpstreamError 502 or 504 with the reason."""
        try:
            await asyncio.wait_for(self._open(factory, server), self._timeout_s)
        except asyncio.TimeoutError:
            raise UpstreamError(504, "connect_timeout") from None
        except ssl.SSLError:
            raise UpstreamError(502, "tls_failed") from None
        except OSError:
            raise UpstreamError(502, "connect_failed") from None

    async def _open(self, factory: Callable[[], asyncio.Protocol], server: Server) -> None:
        loop = asyncio.get_running_loop()
        address = server.address
        name = None if self._context is None else self._server_name(server)
        if isinstance(address, UnixAddress):
            await loop.create_unix_connection(factory, str(address.path), ssl=self._context, server_hostname=name)
        else:
            await loop.create_connection(factory, address.host, address.port, ssl=self._context, server_hostname=name)

    def _server_name(self, server: Server) -> str:
        """Return what the certificate is verified for, and sent as SNI unless it is an IP address."""
        assert self._tls is not None
        if self._tls.server_name is not None:
            return self._tls.server_name
        configured = server.config.address
        return configured.host if isinstance(configured, Address) else ""


def _client_context(tls: UpstreamTlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=tls.ca_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not tls.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
