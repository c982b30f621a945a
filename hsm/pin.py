"""Where a PIN comes from. It is never on a command line, in a log or in an error."""

from __future__ import annotations

import os
import secrets
import stat

from hsm.errors import TokenConfigError

MAX_PIN_BYTES = 255
_NEW_PIN_BYTES = 24


def read_pin(pin_file: str | None, pin_env: str | None) -> bytearray:
    """Return the PIN from the one source that is given; the caller overwrites it after use.

    Raises TokenConfigError: no such source, an empty or overlong PIN, or a file that everyone may read.
    """
    if pin_env is not None:
        value = os.environ.pop(pin_env, None)
        if value is None:
            raise TokenConfigError(f"environment variable {pin_env}: expected the token's PIN; it is not set")
        return _checked(bytearray(os.fsencode(value)), f"environment variable {pin_env}")
    assert pin_file is not None
    try:
        with open(pin_file, "rb", buffering=0) as stream:
            mode = os.fstat(stream.fileno()).st_mode
            pin = bytearray(MAX_PIN_BYTES + 3)
            del pin[stream.readinto(pin) or 0 :]
    except OSError as error:
        raise TokenConfigError(f"{pin_file}: expected the token's PIN; {error.strerror}") from None
    if stat.S_ISREG(mode) and mode & stat.S_IRWXO:
        raise TokenConfigError(
            f"{pin_file}: expected a file closed to others (mode 0600); got {stat.S_IMODE(mode):04o}"
        )
    return _checked(pin, pin_file)


def _checked(pin: bytearray, place: str) -> bytearray:
    while pin and pin[-1] in b"\r\n":
        pin.pop()
    if not 1 <= len(pin) <= MAX_PIN_BYTES:
        raise TokenConfigError(f"{place}: expected a PIN of 1 to {MAX_PIN_BYTES} bytes; got {len(pin) or 'none'}")
    return pin


def wipe(secret: bytearray) -> None:
    """Overwrite a secret in place.

    What Python or a library copied from it stays until that memory is used again: an immutable `bytes` cannot be wiped.
    So this shortens a secret's life and no more; the worker's isolation is what protects it.
    """
    secret[:] = bytes(len(secret))


def create_pin_file(path: str) -> None:
    """Write a new random PIN to a new file of mode 0600. Raises FileExistsError and other OSErrors."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_urlsafe(_NEW_PIN_BYTES) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
