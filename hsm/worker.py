"""The only process that holds a token's PIN, its PKCS#11 library, or its keys: `python -m hsm.worker [FD]`.

It reads its WorkerSpec from the inherited descriptor FD (3 unless given), seals itself, opens the token, says so on its
status descriptor, and signs for the clients of its Unix socket. It ends on SIGTERM or when the far end of FD closes,
after answering what it has received. Exit codes: 0 told to end; 2 a fault that a restart cannot cure (the PIN was
refused, the token's file is damaged, ...); 1 any other.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

from typing_extensions import assert_never

from hsm import landlock, logs, serving_inline, serving_threaded
from hsm.backends.awskms import AwsKmsBackend
from hsm.backends.base import Backend
from hsm.backends.opening import step, told_to
from hsm.backends.pkcs11 import Pkcs11Backend
from hsm.backends.pkcs11_token import TokenSelector
from hsm.backends.soft import SoftBackend
from hsm.errors import HsmError, TokenError
from hsm.messages import keys_to_json
from hsm.metricstore import MetricStore
from hsm.pin import read_pin, wipe
from hsm.seal import become, close_descriptors, leave_terminal, seal_process
from hsm.workerspec import MAX_SPEC_BYTES, SPEC_FD, WorkerSpec, WorkerSpecError

_EXIT_FAILED = 1
_EXIT_PERMANENT = 2

_Serve = Callable[[Backend, socket.socket, WorkerSpec, MetricStore, Sequence[int]], None]

_log = logging.getLogger("hsm.worker")


def main(arguments: Sequence[str]) -> int:
    """Run the worker; return its exit code."""
    # When a worker ends is for the supervisor to decide, not for who interrupts all that belongs together.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        spec_fd = int(arguments[0]) if arguments else SPEC_FD
        spec = WorkerSpec.from_json(_read_spec(spec_fd))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hsm worker: the specification on the inherited descriptor: {error}\n")
        return _EXIT_PERMANENT
    inherited = (spec_fd, spec.listen_fd, spec.status_fd, spec.metrics_fd)
    close_descriptors(fd for fd in inherited if fd is not None)
    logs.configure(spec.log_level, spec.log_format, f"hsm-worker-{spec.token}")
    try:
        leave_terminal()
        become(spec.run_as)
        seal_process()
        _run(spec, spec_fd)
    except TokenError as error:
        return _fail(spec, str(error), permanent=False)
    except (HsmError, WorkerSpecError) as error:
        return _fail(spec, str(error), permanent=True)
    except OSError as error:
        return _fail(spec, f"{error.strerror}", permanent=False)
    return 0


def _run(spec: WorkerSpec, spec_fd: int) -> None:
    listener = socket.socket(fileno=spec.listen_fd)
    if listener.family != socket.AF_UNIX:
        raise WorkerSpecError(f"listen_fd: expected a Unix socket; got one of family {listener.family}")
    try:
        store = MetricStore(spec.metrics_fd)
    except ValueError as error:
        raise WorkerSpecError(f"metrics_fd: {error}") from None
    with told_to(lambda name: _report(spec, {"state": "opening", "step": name})):
        backend, serve = _open_backend(spec, store)
    _confine(spec)
    stop_fds = (spec_fd, _stop_on_sigterm())
    _log.info("ready, %d keys: %s", len(backend.keys), ", ".join(key.label for key in backend.keys))
    _report(spec, {"state": "ready", "pid": os.getpid(), "keys": keys_to_json(backend.keys)})
    # Where this raises, a thread may still be inside the token's library: then it must not be told to close.
    serve(backend, listener, spec, store, stop_fds)
    backend.close()


def _open_backend(spec: WorkerSpec, store: MetricStore) -> tuple[Backend, _Serve]:
    """Return the opened token, and what serves a token of its kind."""
    match spec.kind:
        case "soft":
            assert spec.path is not None
            with _pin(spec) as pin:
                return SoftBackend(spec.path, pin), serving_inline.serve
        case "pkcs11":
            return _open_pkcs11(spec, store), serving_threaded.serve
        case "awskms":
            assert spec.region is not None
            kms = AwsKmsBackend(spec.keys, region=spec.region, endpoint_url=spec.endpoint_url, sessions=spec.sessions)
            return kms, serving_threaded.serve
        case _:
            assert_never(spec.kind)


def _open_pkcs11(spec: WorkerSpec, store: MetricStore) -> Pkcs11Backend:
    assert spec.module is not None
    selector = TokenSelector(spec.token_label, spec.token_serial, spec.slot)
    with _pin(spec) as pin:
        return Pkcs11Backend(
            spec.module,
            selector,
            pin,
            sessions=spec.sessions,
            key_references=spec.keys,
            name=spec.token,
            store=store,
        )


def _confine(spec: WorkerSpec) -> None:
    """Give up what a token of this kind does not need once it is open. Raises OSError."""
    match spec.kind:
        case "soft":
            # The keys are in memory; the token's file and the PIN's have been read.
            forbidden = landlock.Tcp.BIND | landlock.Tcp.CONNECT
            abi = landlock.restrict(readable=landlock.program_paths(), forbidden=forbidden, isolated=True)
        case "awskms":
            # Credentials are read again, from wherever, and may come from a program that a profile names.
            abi = landlock.restrict(readable=None, forbidden=landlock.Tcp.BIND, isolated=False)
        case "pkcs11":
            # A vendor's library may need any file, socket and process: nothing is certain.
            return
        case _:
            assert_never(spec.kind)
    _log.info("confined" if abi else "not confined: this kernel has no Landlock", extra={"landlock": abi})


@contextlib.contextmanager
def _pin(spec: WorkerSpec) -> Iterator[bytearray]:
    step("reading the PIN")
    pin = read_pin(spec.pin_file, spec.pin_env)
    try:
        yield pin
    finally:
        wipe(pin)


def _read_spec(fd: int) -> bytes:
    """Return the first line. Byte by byte, so that what follows stays readable and tells the end of the parent."""
    line = bytearray()
    while len(line) < MAX_SPEC_BYTES:
        byte = os.read(fd, 1)
        if byte in (b"\n", b""):
            return bytes(line)
        line += byte
    raise WorkerSpecError(f"expected a line of at most {MAX_SPEC_BYTES} bytes")


def _stop_on_sigterm() -> int:
    """Return a descriptor that becomes readable on SIGTERM. Before, while a token opens, SIGTERM ends the process."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
    return reader


def _fail(spec: WorkerSpec, message: str, *, permanent: bool) -> int:
    _log.error("%s", message)
    _report(spec, {"state": "failed", "error": message, "permanent": permanent})
    return _EXIT_PERMANENT if permanent else _EXIT_FAILED


def _report(spec: WorkerSpec, status: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError), open(spec.status_fd, "w", closefd=False) as stream:
        stream.write(json.dumps(status) + "\n")


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    logging.shutdown()
    # Not sys.exit: a token's library must not run its destructors while a thread is stuck inside it.
    os._exit(exit_code)
