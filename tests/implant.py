"""Code of ours inside a worker process once that is confined, as if it had been taken over."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

_SITECUSTOMIZE = """
import os, pathlib, sys

if {"hsm.worker", "tlsproxy.serve.worker"} & set(sys.orig_argv):
    import json, socket, struct, threading
    from hsm import landlock

    def obey(connection):
        with connection, connection.makefile("rwb") as stream:
            while line := stream.readline():
                order = json.loads(line)
                scope = {}
                exec(order["code"], scope)
                stream.write(json.dumps(eval(order["result"], scope)).encode() + b"\\n")
                stream.flush()

    def restrict(**restrictions):
        abi = really_restrict(**restrictions)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(pathlib.Path(__file__).parent.with_suffix(".sock")))
        threading.Thread(target=obey, args=[connection], daemon=True).start()
        return abi

    really_restrict, landlock.restrict = landlock.restrict, restrict
"""
_CREDENTIALS = struct.Struct("3i")

SPY = """
import ctypes, json

def spy(pid):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.process_vm_readv.argtypes = [
        ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong
    ]
    results = {}
    buffer = ctypes.create_string_buffer(1)
    byte = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 1)
    read = libc.process_vm_readv(pid, byte, 1, byte, 1, 0)
    # An address that is not there is a matter of luck: the process could be looked into.
    results["readv"] = "done" if read >= 0 or ctypes.get_errno() == 14 else ctypes.get_errno()
    for file in ("mem", "maps", "environ", "fd/0"):
        try:
            open(f"/proc/{pid}/{file}", "rb", buffering=0).close()
            results[file] = "done"
        except OSError as error:
            results[file] = error.errno
    for name, request in (("seize", 0x4206), ("attach", 16)):  # the first does not stop it
        results[name] = ctypes.get_errno() if libc.ptrace(request, pid, None, None) < 0 else "done"
    return results
"""
"""Defines `spy`, which tries all ways to look into a process, and returns the errno of each or "done"."""

ATTEMPTS = """
import ctypes, os, socket, subprocess

def landlock_version():
    libc = ctypes.CDLL(None)
    return libc.syscall(444, None, ctypes.c_size_t(0), 1)

def attempt(what):
    try:
        what()
        return "done"
    except OSError as error:
        return error.errno

def bind():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

def connect(port):
    socket.create_connection(("127.0.0.1", port)).close()

def attempts(secret, port):
    import sqlite3.dump  # modules can be imported as ever
    return {
        "read": attempt(lambda: open(secret).read()),
        "write": attempt(lambda: open(secret + ".new", "w")),
        "list": attempt(lambda: os.listdir(os.path.dirname(secret))),
        "unlink": attempt(lambda: os.unlink(secret)),
        "passwd": attempt(lambda: open("/etc/passwd").read()),
        "library": attempt(lambda: open("/usr/lib/os-release").read()),
        "execute": attempt(lambda: subprocess.run(["/usr/bin/true"])),
        "bind": attempt(bind),
        "connect": attempt(lambda: connect(port)),
        "signal": attempt(lambda: os.kill(os.getppid(), 0)),
    }
"""
"""Defines `attempts`, which tries what a worker has no need to do, and returns the errno of each or "done"."""


class Implants:
    """Where the workers report that are started with PYTHONPATH from `environment`."""

    def __init__(self, directory: Path) -> None:
        packages = directory / "implant"
        packages.mkdir()
        (packages / "sitecustomize.py").write_text(_SITECUSTOMIZE)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(30)
        self._listener.bind(str(directory / "implant.sock"))
        self._listener.listen()
        self._connections: dict[int, socket.socket] = {}
        self.environment = {"PYTHONPATH": str(packages)}

    def evaluate(self, pid: int, code: str, result: str) -> Any:
        """Run `code` in process `pid`; return the value there of the expression `result`. Blocks."""
        while pid not in self._connections:
            connection, _ = self._listener.accept()
            connection.settimeout(30)
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            self._connections[_CREDENTIALS.unpack(peer)[0]] = connection
        with self._connections[pid].makefile("rwb") as stream:
            stream.write(json.dumps({"code": code, "result": result}).encode() + b"\n")
            stream.flush()
            return json.loads(stream.readline())

    def close(self) -> None:
        """Leave the workers alone."""
        for opened in (self._listener, *self._connections.values()):
            opened.close()
