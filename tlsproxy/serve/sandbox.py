"""Confines a proxy worker by Landlock (landlock(7)), where the kernel has it.

A worker that has been taken over reads no file but the program's own and what name resolution needs, writes none, binds
no TCP port, and can neither trace nor signal a process outside. Descriptors it has already are not affected.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import ssl
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import hsm
import tlsproxy

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System call numbers, the same on all architectures."""
_GET_VERSION = 1
_PATH_BENEATH = 1
_RULESET = struct.Struct("QQQ")
"""Handled rights to files and to the network, and scopes; older kernels know a beginning of it."""
_PATH_RULE = struct.Struct("=Qi")
_READ = 1 << 0 | 1 << 2 | 1 << 3
"""Execute, read a file, read a directory."""
_BIND_TCP = 1 << 0
_ABSTRACT_SOCKETS_AND_SIGNALS = 1 << 0 | 1 << 1
_FILE_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights there are, by version of the interface; 16 from 5 on."""
_RESOLVER_PATHS = ("/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/nscd")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def confine(*, resolves_names: bool) -> int:
    """Confine this thread and all it will start; return the interface's version, 0 where the kernel has none.

    Needs PR_SET_NO_NEW_PRIVS. What is replaced in /etc while the worker runs must stay readable if it `resolves_names`,
    so then all of /etc is. Raises OSError.
    """
    abi = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _GET_VERSION)
    if abi <= 0:
        return 0
    file_rights = (1 << _FILE_RIGHTS_BY_ABI.get(abi, 16)) - 1
    attributes = _RULESET.pack(
        file_rights, _BIND_TCP if abi >= 4 else 0, _ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0
    )
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _checked(_libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0))
    try:
        for path in {*_program_paths(), *(_RESOLVER_PATHS if resolves_names else ())}:
            _allow_reading(ruleset, path)
        _checked(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)
    return int(abi)


def _program_paths() -> Iterator[str]:
    """Python, its modules, ours, the system's libraries, and what OpenSSL reads of its own."""
    yield from (sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64")
    yield from (str(Path(package.__file__).parent) for package in (hsm, tlsproxy) if package.__file__)
    openssl = ssl.get_default_verify_paths()
    yield from filter(None, (openssl.cafile, openssl.capath, "/etc/ssl/openssl.cnf"))


def _allow_reading(ruleset: int, path: str) -> None:
    # What this user cannot reach anyway needs no rule.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            rights = _READ if os.path.isdir(path) else _READ & ~(1 << 3)
            _checked(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, _PATH_RULE.pack(rights, descriptor), 0))
        finally:
            os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result
