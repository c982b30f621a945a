"""The runtime directory: the sockets between the processes, closed to others, and one instance at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

from hsm.errors import TokenConfigError
from hsm.launcher import make_private
from tlsproxy.errors import StartupError
from tlsproxy.serve.command_socket import key_file
from tlsproxy.serve.users import identity

COMMAND_SOCKET = "control.sock"


class RuntimeDirectory:
    """The directory, ours until closed."""

    def __init__(self, path: Path, user: str | None, lock_fd: int | None = None) -> None:
        """Make and lock it, and clear what an instance that was killed has left; `user` may pass through it.

        With the lock of an instance that is being taken over from, both have it. Raises StartupError.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            who = identity(user, "user")
            make_private(str(path), who[1] if who else None)
            if lock_fd is not None:
                self.lock_fd = lock_fd
                return
            self.lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            key_file(self.command_socket).unlink(missing_ok=True)
            for leftover in path.glob("hsm-*"):
                shutil.rmtree(leftover)
        except BlockingIOError:
            raise StartupError(f"runtime_dir: {path} is in use by another tlsproxy") from None
        except TokenConfigError as error:
            raise StartupError(f"runtime_dir: {error}") from None
        except OSError as error:
            raise StartupError(f"runtime_dir: cannot use {path}: {error.strerror}") from None

    @property
    def command_socket(self) -> Path:
        """Where operators' commands are taken."""
        return self.path / COMMAND_SOCKET

    def close(self) -> None:
        """Let another instance have it."""
        os.close(self.lock_fd)
