"""Whom workers run as when root has started the proxy: it binds and reads, they serve."""

from __future__ import annotations

import os
import pwd

from tlsproxy.errors import StartupError


def identity(user: str | None, what: str) -> tuple[int, ...]:
    """Return uid, gid and supplementary gids of `user`, a name or a uid; nothing for None or who we are already.

    A uid that has no name has the gid of the same number. Raises StartupError; `what` names the user in it.
    """
    if user is None:
        return ()
    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        uid, gid, groups = entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid)
    except KeyError:
        if not user.isdigit():
            raise StartupError(f"{what}: expected a user of this machine; got {user!r}") from None
        uid, gid, groups = int(user), int(user), []
    if uid == os.geteuid():
        return ()
    if os.geteuid() != 0:
        raise StartupError(f"{what}: only root can start workers as another user; got {user!r}")
    return (uid, gid, *groups)
