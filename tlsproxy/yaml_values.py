"""Kinds of values that several sections of the configuration have: names, hosts, addresses, networks."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

from tlsproxy.config import Address, Network, UnixAddress
from tlsproxy.yaml_nodes import Value

NOWHERE = Address("", 0)
"""Stands for an address that was left out or is invalid."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HOST_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
"""A token of HTTP (RFC 9110 section 5.6.2): the name of a header field or a cookie."""
_HOST = re.compile(rf"{HOST_LABEL}(?:\.{HOST_LABEL})*", re.IGNORECASE)


def read_name(value: Value) -> str:
    """Return a name of one of the configuration's own things."""
    return value.text("a name of letters, digits, '.', '_' and '-', at most 63 long", _NAME)


def read_host_name(value: Value) -> str:
    """Return a DNS name."""
    return value.text("a host name", _HOST)


def read_listen_address(value: Value) -> Address:
    """Return an IP address and a port."""
    expected = "IP:port, such as 0.0.0.0:8443 or [::]:8443"
    address = _split_address(value.text(expected))
    if address is None or not address.is_ip:
        raise value.invalid(expected)
    return address


def read_server_address(value: Value) -> Address | UnixAddress:
    """Return a host, by name or IP address, and a port; or the path of a Unix socket."""
    expected = "host:port, such as 127.0.0.1:8000, or unix:/PATH"
    text = value.text(expected)
    if text.startswith("unix:/"):
        return UnixAddress(Path(text.removeprefix("unix:")))
    address = _split_address(text)
    if address is None or not (address.is_ip or _HOST.fullmatch(address.host)):
        raise value.invalid(expected)
    return address


def read_network(value: Value) -> Network:
    """Return an IP network; a single address is one too."""
    expected = "an IP address or network, such as 10.0.0.0/8"
    try:
        return ipaddress.ip_network(value.text(expected))
    except ValueError:
        raise value.invalid(expected) from None


def _split_address(text: str) -> Address | None:
    host, _, port = text.rpartition(":")
    if not re.fullmatch(r"[1-9]\d{0,4}", port) or int(port) > 65535:
        return None
    if host.startswith("[") and host.endswith("]") and ":" in host:
        return Address(host[1:-1], int(port))
    return Address(host, int(port)) if ":" not in host else None
