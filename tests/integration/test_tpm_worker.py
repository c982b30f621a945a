"""A worker before a module that is not SoftHSM2: tpm2-pkcs11 on a TPM 2.0 simulator."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyType, SignRequest, Status
from tests import swtpm
from tests.fault_module import FaultModule
from tests.tokens import SERVER_KEY_EXCHANGE, WorkerClient, WorkerProcess, deadline_in


@pytest.fixture(scope="module")
def tpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[swtpm.Tpm]:
    with swtpm.running_tpm(tmp_path_factory.mktemp("tpm")) as tpm:
        tpm.add_key("www", "ecc256")
        tpm.add_key("www-rsa", "rsa2048")
        yield tpm


@pytest.fixture
def pin_file(tmp_path: Path) -> str:
    path = tmp_path / "pin"
    path.touch(mode=0o600)
    path.write_text(swtpm.PIN)
    return str(path)


@pytest.fixture
def faults(tmp_path: Path, tpm: swtpm.Tpm) -> FaultModule:
    return FaultModule(tmp_path, swtpm.MODULE, tpm.environment)


@pytest.fixture
def worker(tmp_path: Path, faults: FaultModule, pin_file: str) -> Iterator[WorkerProcess]:
    worker = WorkerProcess(
        tmp_path, kind="pkcs11", module=str(faults.path), token_label="tpm", pin_file=pin_file, sessions=3
    )
    yield worker
    worker.process.kill()
    worker.wait()


def sign_with_all(worker: WorkerProcess) -> set[str]:
    """Ask for every scheme of every key, all at once; return the keys that signed."""
    with WorkerClient(worker.socket_path) as client:
        asked = [(key, scheme) for key in client.hello.keys for scheme in key.schemes]
        for start in range(0, len(asked), client.hello.window):
            part = asked[start : start + client.hello.window]
            replies = client.ask(
                *(
                    SignRequest(n, key.number, scheme, deadline_in(30), SERVER_KEY_EXCHANGE)
                    for n, (key, scheme) in enumerate(part)
                )
            )
            for reply in replies:
                key, scheme = part[reply.id]
                assert reply.status is Status.OK, reply
                public_key = load_public_key(key.public_key)
                assert is_signature_valid(public_key, scheme, SERVER_KEY_EXCHANGE, reply.payload), scheme
        return {key.label for key, _ in asked}


def test_signs_with_keys_that_are_in_a_tpm(worker: WorkerProcess) -> None:
    assert worker.status["state"] == "ready", worker.status
    with WorkerClient(worker.socket_path) as client:
        announced = {key.label: (key.key_type, set(key.schemes)) for key in client.hello.keys}
    assert announced == {
        "www": (KeyType.ECDSA_P256, set(KeyType.ECDSA_P256.schemes)),
        "www-rsa": (KeyType.RSA_2048, set(KeyType.RSA_2048.schemes)),
    }
    assert sign_with_all(worker) == {"www", "www-rsa"}


def test_signs_after_a_tpm_has_lost_its_sessions(worker: WorkerProcess, faults: FaultModule) -> None:
    faults.lose_sessions()
    try:
        assert sign_with_all(worker) == {"www", "www-rsa"}
    except (EOFError, OSError):
        # tpm2-pkcs11 1.9.0 itself crashes there now and then. That is a worker lost, which a WorkerGroup replaces.
        assert worker.process.wait(timeout=10) == -signal.SIGSEGV
        return
    # A signing thread that finds its session lost only after another has logged in again makes it three.
    assert faults.get("login_calls") in (2, 3)
