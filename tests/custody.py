"""Looks for a private key in the memory of processes.

A pattern is a span of bytes that cannot be there by chance or from the public key: 32 bytes or more of a private
number, in either byte order (OpenSSL keeps numbers little-endian on most machines), or the whole PKCS#8 document.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hsm.keys import PrivateKey

_SPAN_BYTES = 32
_CHUNK_BYTES = 8 << 20
_UNREADABLE_MAPPINGS = ("[vvar]", "[vvar_vclock]", "[vsyscall]")


@dataclass(frozen=True, slots=True)
class Hit:
    """A pattern found."""

    pattern: str
    mapping: str
    """The line of /proc/PID/maps."""


def private_key_patterns(key: PrivateKey) -> dict[str, bytes]:
    """Return what to look for, by name: of each number its first and last 32 bytes, for half a copy is a leak too."""
    numbers = key.private_numbers()
    if isinstance(numbers, rsa.RSAPrivateNumbers):
        secrets = {"d": numbers.d, "p": numbers.p, "q": numbers.q}
    else:
        secrets = {"d": numbers.private_value}
    patterns = {"PKCS#8": key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())}
    for name, number in secrets.items():
        # A leading zero byte would not be kept everywhere; the number's own bytes are.
        big_endian = number.to_bytes((number.bit_length() + 7) // 8, "big")
        for order, octets in (("big-endian", big_endian), ("little-endian", big_endian[::-1])):
            patterns[f"{name}, {order}, first bytes"] = octets[:_SPAN_BYTES]
            patterns[f"{name}, {order}, last bytes"] = octets[-_SPAN_BYTES:]
    return patterns


def scan_process(pid: int, patterns: Mapping[str, bytes]) -> list[Hit]:
    """Return the patterns in all readable memory of a process other than this one (which holds the patterns itself).

    Raises PermissionError for a process that may not be read: root may read all, others not a sealed one.
    """
    overlap = max(map(len, patterns.values())) - 1
    hits = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in Path(f"/proc/{pid}/maps").read_text().splitlines():
            bounds, permissions = mapping.split()[:2]
            if not permissions.startswith("r") or mapping.endswith(_UNREADABLE_MAPPINGS):
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            for chunk in _chunks(memory.fileno(), start, end, overlap):
                hits += [Hit(name, mapping) for name, pattern in patterns.items() if pattern in chunk]
    return hits


def _chunks(fd: int, start: int, end: int, overlap: int) -> Iterator[bytes]:
    """Read a mapping in pieces that overlap, so that no pattern is cut. What is gone meanwhile is left out."""
    while start < end:
        try:
            chunk = os.pread(fd, min(_CHUNK_BYTES, end - start), start)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                return
            raise
        if not chunk:
            return
        yield chunk
        if len(chunk) <= overlap:
            return
        start += len(chunk) - overlap if start + len(chunk) < end else len(chunk)
