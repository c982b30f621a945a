"""What a figure depends on besides the code: the machine and the versions of everything that took part."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import ssl
import subprocess
import sys
from pathlib import Path

_PACKAGES = ("nginx", "haproxy", "hitch", "stunnel4", "softhsm2", "libengine-pkcs11-openssl", "libssl3")


def describe_machine() -> dict[str, str]:
    """Facts by name, for a reader who wants to repeat a run."""
    facts = {
        "CPU": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "load average before the run": f"{os.getloadavg()[0]:.2f}",
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "") if Path("/etc/os-release").exists() else "",
        "Python": f"{platform.python_version()} ({ssl.OPENSSL_VERSION})",
        "tlsproxy": _output("git", "describe", "--always", "--dirty") or "not in a git tree",
    }
    return facts | _package_versions()


def command() -> str:
    """The command line of this run."""
    return " ".join(["python -m perf", *sys.argv[1:]])


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def _package_versions() -> dict[str, str]:
    lines = _output("dpkg-query", "--show", "--showformat=${Package} ${Version}\n", *_PACKAGES).splitlines()
    return dict(line.split(" ", 1) for line in lines if " " in line)


def _output(*words: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(words, check=False, capture_output=True, text=True).stdout.strip()
    return ""
