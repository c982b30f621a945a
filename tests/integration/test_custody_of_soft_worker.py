"""Where a soft token's private keys are in memory, and where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsm.messages import KeyType, SignatureScheme, SignRequest, Status
from tests.custody import private_key_patterns, scan_process
from tests.tokens import CERTIFICATE_VERIFY, WorkerClient, deadline_in, make_soft_token, soft_worker

KEYS = {"ecdsa": KeyType.ECDSA_P256, "rsa": KeyType.RSA_2048}
SCHEMES = (SignatureScheme.ECDSA_SECP256R1_SHA256, SignatureScheme.RSA_PSS_RSAE_SHA256)

CLIENT = """
import sys
from pathlib import Path
from hsm.messages import SignRequest
from tests.tokens import CERTIFICATE_VERIFY, WorkerClient, deadline_in
with WorkerClient(Path(sys.argv[1])) as client:
    for number in range(200):
        for key, scheme in enumerate(map(int, sys.argv[2:])):
            (reply,) = client.ask(SignRequest(number, key, scheme, deadline_in(30), CERTIFICATE_VERIFY))
            assert reply.status == 0, reply
    print("signed", flush=True)
    sys.stdin.read()
"""


def test_the_worker_has_the_key_and_its_client_does_not(tmp_path: Path) -> None:
    files = make_soft_token(tmp_path, KEYS)
    with soft_worker(tmp_path, files) as worker:
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, str(worker.socket_path), *map(str, map(int, SCHEMES))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"signed\n"
            for key in files.private_keys.values():
                patterns = private_key_patterns(key)
                assert scan_process(client.pid, patterns) == []
                if os.geteuid() == 0:
                    assert scan_process(worker.process.pid, patterns) != [], "the search does not find what is there"
                else:
                    with pytest.raises(PermissionError):
                        scan_process(worker.process.pid, patterns)
        finally:
            client.communicate()


def test_the_pin_is_in_no_environment_command_line_or_log(tmp_path: Path) -> None:
    files = make_soft_token(tmp_path)
    pin = files.pin_file.read_text().strip()
    with soft_worker(tmp_path, files) as worker, WorkerClient(worker.socket_path) as client:
        (reply,) = client.ask(SignRequest(1, 0, SCHEMES[0], deadline_in(30), CERTIFICATE_VERIFY))
        assert reply.status is Status.OK
        process = Path(f"/proc/{worker.process.pid}")
        assert pin.encode() not in (process / "cmdline").read_bytes()
        assert b"hsm.worker" in (process / "cmdline").read_bytes()
        assert pin not in str(worker.status)
        _, log = worker.stop()
        assert "ready" in log
        assert pin not in log
