"""A PKCS#11 module that does to its caller what HSMs do to theirs (fault_module.c), and its control block."""

from __future__ import annotations

import atexit
import enum
import functools
import mmap
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SOURCE = Path(__file__).with_name("fault_module.c")
_HIDDEN_MECHANISMS = 16
_WORD = struct.Struct("=I")
_FIELDS = {
    name: offset * _WORD.size
    for offset, name in enumerate(
        [
            "sign_latency_us",
            "error",
            "error_functions",
            "error_after",
            "error_count",
            "hang_functions",
            "losses",
            "close_one_in",
            "close_all_one_in",
            "corrupt_one_in",
            *(f"hidden_{index}" for index in range(_HIDDEN_MECHANISMS)),
            "sign_calls",
            "login_calls",
            "open_sessions",
            "open_session_calls",
            "find_calls",
            "initialize_calls",
            "failed_closes",
        ]
    )
}
FOREVER = 0xFFFFFFFF


class On(enum.IntFlag):
    """The functions that answer with an error or do not return."""

    SIGN = 1
    SIGN_INIT = 2
    OPEN_SESSION = 4
    LOGIN = 8
    FIND = 16
    SLOTS = 32
    ALL = 63
    """All that concern a token."""
    INITIALIZE = 64


@functools.cache
def _compiled() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="fault-module-")
    atexit.register(directory.cleanup)
    library = Path(directory.name, "fault_module.so")
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, "-o", library, _SOURCE, "-ldl", "-lpthread"], check=True)
    return library


class FaultModule:
    """A copy of the module around a real one: what it does, whatever process has it loaded, and what it was asked."""

    def __init__(self, directory: Path, target: str, environment: Mapping[str, str]) -> None:
        """Put it into `directory`, to wrap the module `target`, which is given this environment."""
        self.path = directory / "fault_module.so"
        shutil.copy(_compiled(), self.path)
        lines = [target, *(f"{name}={value}" for name, value in environment.items())]
        self.path.with_name("fault_module.so.target").write_text("\n".join(lines) + "\n")
        size = len(_FIELDS) * _WORD.size
        with self.path.with_name("fault_module.so.control").open("w+b") as stream:
            stream.truncate(size)
            self._block = mmap.mmap(stream.fileno(), size)

    def fail(self, error: int, on: On, times: int = FOREVER, *, after: int = 0) -> None:
        """Answer these functions with the CKR `error`, so many times, once `after` more calls have gone well."""
        self._set("error_functions", 0)
        self._set("error_after", after)
        self._set("error", error)
        self._set("error_count", times)
        self._set("error_functions", on)

    def recover(self) -> None:
        """No more errors, and what hangs returns."""
        self._set("error_functions", 0)
        self._set("hang_functions", 0)

    def hang(self, on: On = On.SIGN) -> None:
        """These functions no longer return."""
        self._set("hang_functions", on)

    def lose_sessions(self) -> None:
        """Close all sessions of the application, which ends its login."""
        self._set("losses", self.get("losses") + 1)

    def close_sessions_at_random(self, one_in: int, all_one_in: int = 0) -> None:
        """Before one C_SignInit in so many, close its session; before one in so many, close all sessions. 0: never."""
        self._set("close_one_in", one_in)
        self._set("close_all_one_in", all_one_in)

    def corrupt_signatures(self, one_in: int) -> None:
        """Flip a bit in one signature in so many. 0: never."""
        self._set("corrupt_one_in", one_in)

    def set_sign_latency(self, seconds: float) -> None:
        """Make each C_Sign take so much longer."""
        self._set("sign_latency_us", round(seconds * 1e6))

    def hide_mechanisms(self, *mechanisms: int) -> None:
        """Leave these out of the token's mechanism list."""
        for index, mechanism in enumerate(mechanisms + (0,) * (_HIDDEN_MECHANISMS - len(mechanisms))):
            self._set(f"hidden_{index}", mechanism)

    def get(self, field: str) -> int:
        """Return a field of the control block, by its name in fault_module.c."""
        return int(_WORD.unpack_from(self._block, _FIELDS[field])[0])

    def _set(self, field: str, value: int) -> None:
        _WORD.pack_into(self._block, _FIELDS[field], value)
