"""Confines a proxy worker by Landlock, where the kernel has it.

A worker that has been taken over reads no file but the program's own and what name resolution needs, writes none, runs
no program, binds no TCP port, and can neither trace nor signal a process outside. Descriptors it has already are not
affected.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import tlsproxy
from hsm import landlock

_RESOLVER_PATHS = ("/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/nscd")


def confine(*, resolves_names: bool) -> int:
    """Confine this thread and all it will start; return Landlock's version, 0 where the kernel has none.

    Needs PR_SET_NO_NEW_PRIVS. What is replaced in /etc while the worker runs must stay readable if it `resolves_names`,
    so then all of /etc is. Raises OSError.
    """
    readable = {*landlock.program_paths(), *_own_paths(), *(_RESOLVER_PATHS if resolves_names else ())}
    return landlock.restrict(readable=readable, forbidden=landlock.Tcp.BIND, isolated=True)


def _own_paths() -> Iterator[str]:
    """Our modules, and what libuv and OpenSSL read of their own."""
    yield str(Path(tlsproxy.__file__).parent)
    # libuv keeps it open, to have a descriptor to spare when they run out; if it can't, it tries with every connection.
    yield os.devnull
    openssl = ssl.get_default_verify_paths()
    yield from filter(None, (openssl.cafile, openssl.capath, "/etc/ssl/openssl.cnf"))
