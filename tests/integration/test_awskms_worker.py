"""A worker of keys in AWS KMS, before moto's imitation of it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import botocore.session
import pytest
from moto.server import ThreadedMotoServer

from hsm.backends.awskms import AwsKmsBackend
from hsm.errors import KeyNotFound, TokenConfigError, TokenError
from hsm.keys import is_signature_valid, load_public_key
from hsm.messages import KeyType, SignatureScheme, SignRequest, Status
from tests.implant import ATTEMPTS, Implants
from tests.tokens import SERVER_KEY_EXCHANGE, WorkerClient, WorkerProcess, deadline_in

REGION = "eu-central-1"
P256 = SignatureScheme.ECDSA_SECP256R1_SHA256
KEYS = {"ECC_NIST_P256": "alias/www", "RSA_2048": "alias/www-rsa"}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    session = botocore.session.get_session()
    session.set_credentials("test", "test")
    kms = session.create_client("kms", region_name=REGION, endpoint_url=f"http://{host}:{port}")
    for spec, alias in KEYS.items():
        key = kms.create_key(KeyUsage="SIGN_VERIFY", KeySpec=spec)["KeyMetadata"]["KeyId"]
        kms.create_alias(AliasName=alias, TargetKeyId=key)
    kms.close()
    yield f"http://{host}:{port}"
    server.stop()


def open_kms(endpoint: str, *keys: str, sessions: int = 1) -> AwsKmsBackend:
    return AwsKmsBackend(keys, region=REGION, endpoint_url=endpoint, sessions=sessions)


def test_signs_with_keys_in_kms(endpoint: str, tmp_path: Path) -> None:
    worker = WorkerProcess(
        tmp_path, kind="awskms", region=REGION, endpoint_url=endpoint, keys=tuple(KEYS.values()), sessions=4
    )
    try:
        assert worker.status["state"] == "ready", worker.status
        with WorkerClient(worker.socket_path) as client:
            ecdsa, rsa = client.hello.keys
            assert (ecdsa.label, ecdsa.key_type, ecdsa.schemes) == ("alias/www", KeyType.ECDSA_P256, (P256,))
            assert (rsa.label, rsa.key_type, rsa.schemes) == (
                "alias/www-rsa",
                KeyType.RSA_2048,
                KeyType.RSA_2048.schemes,
            )
            asked = [(key, scheme) for key in (ecdsa, rsa) for scheme in key.schemes]
            replies = client.ask(
                *(
                    SignRequest(n, key.number, scheme, deadline_in(30), SERVER_KEY_EXCHANGE)
                    for n, (key, scheme) in enumerate(asked)
                )
            )
            for reply in replies:
                key, scheme = asked[reply.id]
                if scheme.name.startswith("RSA_PSS"):
                    # moto salts by as much as fits; TLS and KMS by the hash's length (RFC 8446 section 4.2.3).
                    assert reply.payload == b"SIGNATURE_INVALID: the token's signature does not verify"
                    continue
                assert reply.status is Status.OK, reply
                public_key = load_public_key(key.public_key)
                assert is_signature_valid(public_key, scheme, SERVER_KEY_EXCHANGE, reply.payload), scheme
        assert worker.stop()[0] == 0
    finally:
        worker.process.kill()
        worker.wait()


def test_from_inside_the_worker_no_tcp_port_can_be_bound(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Implants(tmp_path)) as implants, socket.create_server(("127.0.0.1", 0)) as server:
        for name, value in implants.environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / "file").touch()
        worker = WorkerProcess(tmp_path, kind="awskms", region=REGION, endpoint_url=endpoint, keys=("alias/www",))
        try:
            call = f"landlock_version(), attempts({str(tmp_path / 'file')!r}, {server.getsockname()[1]})"
            abi, results = implants.evaluate(worker.process.pid, ATTEMPTS, f"({call})")
        finally:
            worker.process.kill()
            worker.wait()
    assert results == dict.fromkeys(results, "done") | ({"bind": errno.EACCES} if abi >= 4 else {})


def test_serves_the_keys_there_are(endpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    backend = open_kms(endpoint, "alias/none", "alias/www")
    assert [(key.number, key.label) for key in backend.keys] == [(0, "alias/www")]
    assert "key 'alias/none': KMS has no key 'alias/none' in this region" in caplog.text
    backend.close()


def test_names_the_keys_that_are_not_there(endpoint: str) -> None:
    with pytest.raises(KeyNotFound, match="expected one of alias/none in KMS; got none"):
        open_kms(endpoint, "alias/none")


def test_wants_credentials(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(TokenConfigError, match="expected AWS credentials"):
        open_kms(endpoint, "alias/www")


def test_an_endpoint_that_does_not_answer_is_worth_another_try() -> None:
    with pytest.raises(TokenError, match="EndpointConnectionError: in get_public_key") as caught:
        open_kms("http://127.0.0.1:9", "alias/www")
    assert caught.value.retryable


class Throttling:
    """Stands before KMS and answers the next `refusals` calls of Sign with an error of its own."""

    def __init__(self, endpoint: str) -> None:
        self.refusals = 0
        self.error = "ThrottlingException"
        self.calls: Counter[str] = Counter()
        outer, target = self, botocore.session.get_session()
        target.set_credentials("test", "test")
        self.kms = target.create_client("kms", region_name=REGION, endpoint_url=endpoint)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        operation = handler.headers["X-Amz-Target"].partition(".")[2]
        self.calls[operation] += 1
        if operation == "Sign" and self.refusals:
            self.refusals -= 1
            status, answer = 400, json.dumps({"__type": self.error, "message": "no"}).encode()
        else:
            status, answer = self._forward(handler, body)
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def _forward(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
        with urlopen(Request(self.kms.meta.endpoint_url, body, headers)) as response:
            return response.status, response.read()


@pytest.fixture
def throttling(endpoint: str) -> Iterator[Throttling]:
    throttling = Throttling(endpoint)
    thread = threading.Thread(target=throttling.server.serve_forever)
    thread.start()
    yield throttling
    throttling.server.shutdown()
    throttling.server.server_close()
    thread.join()
    throttling.kms.close()


def test_tries_again_where_kms_throttles(throttling: Throttling) -> None:
    backend = open_kms(throttling.url, "alias/www")
    throttling.refusals = 3
    signature = backend.signers[0].sign(0, P256, SERVER_KEY_EXCHANGE)
    assert is_signature_valid(load_public_key(backend.keys[0].public_key), P256, SERVER_KEY_EXCHANGE, signature)
    assert throttling.calls["Sign"] == 4
    backend.close()


def test_leaves_it_to_another_token_where_kms_goes_on_throttling(throttling: Throttling) -> None:
    backend = open_kms(throttling.url, "alias/www")
    throttling.refusals = 100
    with pytest.raises(TokenError, match="ThrottlingException: in sign") as caught:
        backend.signers[0].sign(0, P256, SERVER_KEY_EXCHANGE)
    assert caught.value.retryable
    assert throttling.calls["Sign"] == 5
    backend.close()


@pytest.mark.parametrize(("error", "retryable"), [("DisabledException", True), ("ValidationException", False)])
def test_does_not_repeat_what_will_not_change(throttling: Throttling, error: str, retryable: bool) -> None:
    backend = open_kms(throttling.url, "alias/www")
    throttling.refusals, throttling.error = 1, error
    with pytest.raises(TokenError, match=f"{error}: in sign") as caught:
        backend.signers[0].sign(0, P256, SERVER_KEY_EXCHANGE)
    assert caught.value.retryable is retryable
    assert throttling.calls["Sign"] == 1
    backend.close()
