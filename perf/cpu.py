"""CPU time of other processes, in nanosecond steps where the kernel gives them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_CLOCK_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU seconds, user and system, that a process has used; 0 once it has ended.

    Nanoseconds of the live threads, from /proc/PID/task/*/schedstat (Documentation/scheduler/sched-stats.rst).
    Threads that have ended are only in the 10 ms ticks of /proc/PID/stat: the larger figure is the right one.
    """
    total_ns = 0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total_ns += int((task / "schedstat").read_text().split()[0])
    return max(total_ns / 1e9, _cpu_seconds_in_ticks(pid))


def _cpu_seconds_in_ticks(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user, system = text[text.rindex(")") + 2 :].split()[11:13]
    return (int(user) + int(system)) * _CLOCK_TICK_S


def total_cpu_seconds(pids: Iterable[int]) -> float:
    """The sum over several processes."""
    return sum(map(cpu_seconds, pids))


def descendants(pid: int) -> list[int]:
    """A process and all below it, from /proc/PID/task/*/children (needs CONFIG_PROC_CHILDREN, as Debian has)."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found.extend(map(int, children.read_text().split()))
    return found


def command_line(pid: int) -> str:
    """The process's arguments, joined by spaces."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()


def resident_bytes(pid: int) -> int:
    """Resident set size."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
