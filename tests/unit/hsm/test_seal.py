"""Sealing cannot be undone, so each test seals a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_a_sealed_process_cannot_be_dumped_or_gain_privileges() -> None:
    result = run(
        "import ctypes, resource\n"
        "from hsm.seal import seal_process\n"
        "prctl = ctypes.CDLL(None).prctl\n"
        "before = prctl(3, 0, 0, 0, 0), prctl(39, 0, 0, 0, 0)\n"
        "seal_process()\n"
        "print(before, (prctl(3, 0, 0, 0, 0), prctl(39, 0, 0, 0, 0)), resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    assert result.stdout == "(1, 0) (0, 1) (0, 0)\n", "PR_GET_DUMPABLE and PR_GET_NO_NEW_PRIVS before and after"


def test_others_of_the_same_uid_cannot_read_its_memory() -> None:
    uid = os.geteuid() or 65534
    result = run(
        "import os, sys\n"
        f"from hsm.seal import forbid_dumps\n"
        f"os.setuid({uid})\n"
        "from_child, to_parent = os.pipe()\n"
        "to_child, from_parent = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    forbid_dumps()\n"
        "    os.write(to_parent, b'.')\n"
        "    os.close(from_parent)\n"
        "    os.read(to_child, 1)\n"
        "    os._exit(0)\n"
        "os.read(from_child, 1)\n"
        "try:\n"
        "    open(f'/proc/{child}/mem', 'rb')\n"
        "except PermissionError:\n"
        "    print('closed')\n"
        "os.close(from_parent)\n"
        "os.waitpid(child, 0)\n"
    )
    assert result.stdout == "closed\n"


def test_memory_is_locked_where_that_cannot_make_an_allocation_fail() -> None:
    code = (
        "import logging, os, resource, sys\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "from hsm.seal import seal_process\n"
        "{prepare}\n"
        "seal_process()\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmLck')][0] != '0')\n"
        "block = bytearray(64 << 20)\n"
    )
    limited = f"resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\nos.setuid({os.geteuid() or 65534})\n"
    assert run(code.format(prepare=limited)).stdout == (
        "memory is not locked, keys could be swapped out: expected CAP_IPC_LOCK or no limit on locked memory "
        "(ulimit -l); got a limit of 1048576 bytes\nFalse\n"
    )
    if os.geteuid() == 0:
        assert run(code.format(prepare="")).stdout == "True\n"


def test_closes_what_is_not_to_be_kept() -> None:
    result = run(
        "import os\n"
        "from hsm.seal import close_descriptors\n"
        "fds = [os.open('/dev/null', os.O_RDONLY) for _ in range(6)]\n"
        "for fd in fds: os.set_inheritable(fd, True)\n"
        "close_descriptors([fds[4], fds[1]])\n"
        "def is_open(fd):\n"
        "    try:\n"
        "        return bool(os.fstat(fd))\n"
        "    except OSError:\n"
        "        return False\n"
        "print([fds.index(fd) for fd in fds if is_open(fd)], all(map(is_open, range(3))))\n"
        "print([os.get_inheritable(fds[n]) for n in (1, 4)], os.get_inheritable(2))\n"
    )
    assert result.stdout == "[1, 4] True\n[False, False] True\n"
