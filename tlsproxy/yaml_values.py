"""Kinds of values that several sections of the configuration have: names, hosts, addresses, networks."""

from __future__ import annotations

import ipaddress
import re

from tlsproxy.config import Address, Network
from tlsproxy.yaml_nodes import Value

NOWHERE = Address("", 0)
"""Stands for an address that was left out or is invalid."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
HOST_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
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
    if address is None or not _is_ip(address.host):
        raise value.invalid(expected)
    return address


def read_server_address(value: Value) -> Address:
    """Return a host, by name or IP address, and a port."""
    expected = "host:port, such as 127.0.0.1:8000"
    address = _split_address(value.text(expected))
    if address is None or not (_is_ip(address.host) or _HOST.fullmatch(address.host)):
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


def _is_ip(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False
