"""Takes from this process, for good, what it will not need, by Landlock (landlock(7)), where the kernel has it.

Whatever is taken, the process can afterwards neither trace nor look into a process outside (ptrace(2),
/proc/PID/mem). Descriptors it has already are not affected.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import hsm

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System call numbers, the same on all architectures."""
_GET_VERSION = 1
_PATH_BENEATH, _NET_PORT = 1, 2
_RULESET = struct.Struct("QQQ")
"""Handled rights to files and to the network, and scopes; older kernels know a beginning of it."""
_PATH_RULE = struct.Struct("=Qi")
_PORT_RULE = struct.Struct("QQ")
_READ_FILE, _READ_DIRECTORY = 1 << 2, 1 << 3
_ABSTRACT_SOCKETS_AND_SIGNALS = 1 << 0 | 1 << 1
_FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights there are, by version of the interface; 16 from 5 on."""
_TCP_SINCE_ABI, _SCOPES_SINCE_ABI = 4, 6

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Tcp(enum.IntFlag):
    """What a process does with TCP."""

    BIND = 1
    CONNECT = 2


def restrict(*, readable: Iterable[str] | None, forbidden: Tcp, connectable: Iterable[int] = (), isolated: bool) -> int:
    """Restrict this thread and all it will start; return the interface's version, 0 where the kernel has none.

    Of files only those `readable` and what is below them can be opened, to be read and not to be executed; None leaves
    files alone. What is `forbidden` of TCP, though not connecting to the ports `connectable`, needs version 4. A
    process that is `isolated` signals none outside, and connects to no abstract Unix socket that one outside listens
    on: version 6.

    Needs PR_SET_NO_NEW_PRIVS. Raises OSError.
    """
    abi = int(_libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION))
    if abi <= 0:
        return 0
    file_rights = 0 if readable is None else (1 << _FILE_RIGHTS_BY_ABI.get(abi, 16)) - 1
    tcp_rights = forbidden if abi >= _TCP_SINCE_ABI else 0
    scopes = _ABSTRACT_SOCKETS_AND_SIGNALS if isolated and abi >= _SCOPES_SINCE_ABI else 0
    if not (file_rights or tcp_rights or scopes):
        return 0
    attributes = _RULESET.pack(file_rights, tcp_rights, scopes)
    size = 8 if abi < _TCP_SINCE_ABI else 16 if abi < _SCOPES_SINCE_ABI else 24
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    try:
        for path in sorted(set(readable or ())):
            _allow_reading(ruleset, path)
        for port in connectable if tcp_rights & Tcp.CONNECT else ():
            _checked(_libc.syscall(_ADD_RULE, ruleset, _NET_PORT, _PORT_RULE.pack(Tcp.CONNECT, port), 0))
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return abi


def program_paths() -> Iterator[str]:
    """Return where Python, its modules, this package and the system's libraries are."""
    yield from (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", str(Path(hsm.__file__).parent))


def _allow_reading(ruleset: int, path: str) -> None:
    # What this user cannot reach anyway needs no rule.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rights = _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
            _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, _PATH_RULE.pack(rights, descriptor), 0))
        finally:
            os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
