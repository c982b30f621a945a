"""Closes a process that will hold keys: to debuggers, core dumps, swap, privilege and inherited descriptors.

And takes on another user's identity, for a worker that was started by root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import resource
import termios
from collections.abc import Iterable, Sequence
from pathlib import Path

_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_MCL_CURRENT = 1
_MCL_FUTURE = 2
_MCL_ONFAULT = 4
_CAP_IPC_LOCK = 14

_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


def seal_process() -> None:
    """Close this process to others of its uid, as far as Linux lets it (prctl(2), mlockall(2)).

    Raises OSError if it stays dumpable or could gain privileges. Memory that cannot be locked is a warning.
    """
    forbid_dumps()
    forbid_new_privileges()
    _lock_memory()


def become(run_as: Sequence[int]) -> None:
    """Become the user with the uid, gid and supplementary gids in `run_as`, for good; stay who we are if it is empty.

    The limit on locked memory goes first, as only root may lift it. Afterwards others of that uid can neither trace
    this process nor have it dump core. Raises OSError.
    """
    if not run_as:
        return
    uid, gid, *groups = run_as
    # A container's root may not: then memory stays unlocked, and seal_process warns of it.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    forbid_dumps()


def forbid_new_privileges() -> None:
    """Keep this process and its children from gaining privileges by exec (PR_SET_NO_NEW_PRIVS). Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def leave_terminal() -> None:
    """Give up the controlling terminal: whoever has one can type into it (TIOCSTI), commands to the shell of root.

    Not by a session of its own: Linux's autogroups schedule each session by itself, which processes that hand work to
    one another in batches do not gain by. Raises OSError.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return
        raise
    try:
        fcntl.ioctl(terminal, termios.TIOCNOTTY)
    finally:
        os.close(terminal)


def forbid_dumps() -> None:
    """Refuse core dumps, ptrace(2) and reads of /proc/PID/mem by others of this uid. Raises OSError."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def _lock_memory() -> None:
    if not _may_lock_all():
        _log.warning(
            "memory is not locked, keys could be swapped out: "
            "expected CAP_IPC_LOCK or no limit on locked memory (ulimit -l); got a limit of %d bytes",
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        )
    elif _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT) != 0:
        _log.warning("memory is not locked, keys could be swapped out: %s", os.strerror(ctypes.get_errno()))


def _may_lock_all() -> bool:
    """Tell whether locking cannot make a later allocation fail, as it would under a limit."""
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        return True
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def close_descriptors(keep: Iterable[int]) -> None:
    """Close every descriptor above 2 but those in `keep`: an inherited one may lead to a network or a file.

    Programs that this process starts, or a library in it, get none of them: one that stays when this process has ended
    would hide that from whoever watches over the other end.
    """
    low = 3
    for fd in sorted(set(keep)):
        os.closerange(low, fd)
        with contextlib.suppress(OSError):  # whoever uses it will tell
            os.set_inheritable(fd, False)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
