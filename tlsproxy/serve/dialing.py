"""How a connection to an upstream's server is opened: TCP or a Unix socket, with TLS or without."""

from __future__ import annotations

import asyncio
import socket
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

    async def open(self, factory: Callable[[], asyncio.Protocol], server: Server, preamble: bytes) -> None:
        """Connect `factory`'s protocol to `server`; `preamble`, if not empty, is sent before everything, TLS included.

        Raises UpstreamError 502 or 504 with the reason.
        """
        opening = self._open_after(preamble, factory, server) if preamble else self._open(factory, server)
        try:
            await asyncio.wait_for(opening, self._timeout_s)
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

    async def _open_after(self, preamble: bytes, factory: Callable[[], asyncio.Protocol], server: Server) -> None:
        loop = asyncio.get_running_loop()
        address = server.address
        name = None if self._context is None else self._server_name(server)
        is_unix = isinstance(address, UnixAddress)
        to = str(address.path) if isinstance(address, UnixAddress) else (address.host, address.port)
        family = socket.AF_UNIX if is_unix else socket.AF_INET6 if ":" in to[0] else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            await loop.sock_connect(connection, to)
            await loop.sock_sendall(connection, preamble)
            create = loop.create_unix_connection if is_unix else loop.create_connection
            await create(factory, sock=connection, ssl=self._context, server_hostname=name)
        except BaseException:
            connection.close()
            raise

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
