"""How many cores this process may use: what it is pinned to, and what CPU its control groups leave it."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_CPU_OF_EACH_VERSION = {"cgroup2": "", "cgroup": "cpu"}
"""Type of the file system, and how a line of /proc/PID/cgroup names the controller that limits CPU time there."""


def usable_cores(process: Path = Path("/proc/self")) -> int:
    """Return how many cores can be kept busy, at least 1: the affinity mask's, or fewer by a quota, rounded up.

    A quota is the least of the process's control group and those above it that can be seen: cgroup v2 `cpu.max`, v1
    `cpu.cfs_quota_us` (docs.kernel.org, "CPU Bandwidth Control" and "Control Group v2"). `process` is its directory
    in /proc. What can't be read limits nothing.
    """
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quotas = [quota for group in _groups(process) if (quota := _quota(group)) is not None]
        return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))
    return len(os.sched_getaffinity(0))


def _groups(process: Path) -> Iterator[Path]:
    """Yield the directories of the control groups that limit the process's CPU time, the innermost first."""
    paths: dict[str, str] = {}
    for line in (process / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in (process / "mountinfo").read_text().splitlines():
        # ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS [TAG ...] - TYPE SOURCE SUPER-OPTIONS: proc_pid_mountinfo(5).
        mount, _, file_system = line.partition(" - ")
        kind, _, options = file_system.split(" ", 2)
        controller = _CPU_OF_EACH_VERSION.get(kind)
        if controller is None or (controller and controller not in options.split(",")) or controller not in paths:
            continue
        root, mount_point = (_unescaped(field) for field in mount.split(" ")[3:5])
        below = os.path.relpath(paths[controller], root)
        # A container may see a group under another name than the kernel's: then its mount shows the group itself.
        group = Path(mount_point) if below.startswith("..") else Path(mount_point, below)
        while group.is_relative_to(mount_point):
            yield group
            group = group.parent


def _unescaped(field: str) -> str:
    """Undo what mountinfo does to spaces and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _quota(group: Path) -> float | None:
    """Return the cores whose time the group may use, None if it has no quota."""
    with contextlib.suppress(FileNotFoundError):
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(FileNotFoundError):
        quota_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if quota_us < 0 else quota_us / int((group / "cpu.cfs_period_us").read_text())
    return None
