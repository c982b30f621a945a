"""A TPM 2.0 simulator and tpm2-pkcs11 before it: a second PKCS#11 module, slow and unlike SoftHSM2 in much."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MODULE = "/usr/lib/x86_64-linux-gnu/pkcs11/libtpm2_pkcs11.so"
PIN = "1234"
_START_TIMEOUT_S = 20


class Tpm:
    """A running simulator with a token `tpm`. `environment` is what a process needs to use it."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        store = directory / "store"
        store.mkdir()
        port = _free_port_pair()
        _start_swtpm(directory, port, stack)
        bus_address = _start_bus(directory, stack)
        self.environment = {
            "DBUS_SESSION_BUS_ADDRESS": bus_address,
            "TPM2TOOLS_TCTI": "tabrmd:bus_type=session",
            "TPM2_PKCS11_TCTI": "tabrmd:bus_type=session",
            "TPM2_PKCS11_STORE": str(store),
            "TPM2_PKCS11_LOG_LEVEL": "0",
            "TSS2_LOG": "all+NONE",
        }
        self._start_broker(port, stack)
        self._ptool("init")
        self._ptool("addtoken", "--pid=1", "--label=tpm", "--sopin=1234", f"--userpin={PIN}")

    def add_key(self, label: str, algorithm: str) -> None:
        """Generate a key pair in the TPM: ecc256, rsa2048, ..."""
        self._ptool("addkey", "--label=tpm", f"--algorithm={algorithm}", f"--key-label={label}", f"--userpin={PIN}")

    def _ptool(self, *arguments: str) -> None:
        result = subprocess.run(
            ["tpm2_ptool", *arguments], env=os.environ | self.environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr

    def _start_broker(self, port: int, stack: contextlib.ExitStack) -> None:
        """Start the resource manager: without one, a TPM has room for three keys and sessions."""
        command = ["tpm2-abrmd", "--session", "--allow-root", f"--tcti=swtpm:host=127.0.0.1,port={port}"]
        _spawn(command, self._directory / "abrmd.log", stack, os.environ | self.environment)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        probe = ["tpm2_getcap", "properties-fixed"]
        while subprocess.run(probe, env=os.environ | self.environment, capture_output=True).returncode != 0:
            assert time.monotonic() < deadline_s, (self._directory / "abrmd.log").read_text()
            time.sleep(0.05)


@contextlib.contextmanager
def running_tpm(directory: Path) -> Iterator[Tpm]:
    """Run a simulator, a bus and a broker while the context lasts."""
    with contextlib.ExitStack() as stack:
        yield Tpm(directory, stack)


def _spawn(command: list[str], log: Path, stack: contextlib.ExitStack, environment: dict[str, str]) -> None:
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(10)

    stack.callback(end)


def _start_swtpm(directory: Path, port: int, stack: contextlib.ExitStack) -> None:
    state = directory / "state"
    state.mkdir()
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear"]
    for option, number in (("--server", port), ("--ctrl", port + 1)):
        command += [option, f"type=tcp,bindaddr=127.0.0.1,port={number}"]
    _spawn(command, directory / "swtpm.log", stack, dict(os.environ))
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    # Asked at the control port, for the other serves one connection and no more.
    while not _is_listening(port + 1):
        assert time.monotonic() < deadline_s, (directory / "swtpm.log").read_text()
        time.sleep(0.02)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _start_bus(directory: Path, stack: contextlib.ExitStack) -> str:
    log = directory / "bus.log"
    command = ["dbus-daemon", "--session", "--nofork", "--print-address=1", f"--address=unix:dir={directory}"]
    _spawn(command, log, stack, dict(os.environ))
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while not (found := re.search(r"^unix:\S+$", log.read_text(), re.MULTILINE)):
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.02)
    return found.group()


def _free_port_pair() -> int:
    """Return a port such that it and the next are free: the TCTI takes the control port to be the next."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port
