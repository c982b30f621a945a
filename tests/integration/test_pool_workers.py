"""SignerPool and WorkerGroup over real worker processes of a soft token."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import sys
import textwrap
import time

import pytest

from hsm import dispatch, metrics
from hsm.errors import PolicyRejected, TokenConfigError, WorkerFailed
from hsm.keys import is_signature_valid
from hsm.launcher import SoftToken, WorkerGroup, open_pool
from hsm.messages import KeyType, SignatureScheme
from hsm.metricstore import MetricStore, read_samples
from hsm.pool import Signature, SignerPool
from tests.tokens import CERTIFICATE_VERIFY, SERVER_KEY_EXCHANGE, make_soft_token

EVENT_LOOPS = ("asyncio", "uvloop")
SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256


@pytest.fixture
def files(tmp_path):
    return make_soft_token(tmp_path, {"www": KeyType.ECDSA_P256, "rsa": KeyType.RSA_2048})


def soft_token(files, **fields) -> SoftToken:
    return SoftToken(**{"name": "local", "path": str(files.path), "pin_file": str(files.pin_file)} | fields)


@pytest.fixture
async def group(tmp_path, files):
    group = WorkerGroup(soft_token(files, workers=2), str(tmp_path / "run"))
    group.start()
    try:
        await group.wait_ready(30)
        yield group
    finally:
        await group.stop()


async def wait_for(condition) -> None:
    async def poll() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), 30)


async def test_the_example_in_the_docstring_runs(tmp_path, files, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paragraphs = inspect.cleandoc(SignerPool.__doc__ or "").split("\n\n")
    imports, body = [textwrap.dedent(p) for p in paragraphs if p.startswith("    ")]
    scope: dict[str, object] = {}
    source = f"{imports}\nasync def example(tbs):\n{textwrap.indent(body, '    ')}"
    exec(compile(source, "docstring", "exec"), scope)
    await scope["example"](CERTIFICATE_VERIFY)
    length, token, *_ = capsys.readouterr().out.split()
    assert 68 <= int(length) <= 72
    assert token == "local"


async def test_every_scheme_verifies(group, files):
    async with SignerPool([group.endpoints]) as pool:
        for label, key_type in (("www", KeyType.ECDSA_P256), ("rsa", KeyType.RSA_2048)):
            for scheme in key_type.schemes:
                tbs = SERVER_KEY_EXCHANGE if "PKCS1" in scheme.name else CERTIFICATE_VERIFY
                signature = await pool.sign(label, scheme, tbs)
                assert is_signature_valid(files.private_keys[label].public_key(), scheme, tbs, signature.value)


async def test_no_signing_oracle(group):
    async with SignerPool([group.endpoints]) as pool:
        with pytest.raises(PolicyRejected, match="tls12"):
            await pool.sign("www", SCHEME, b"a document")


async def test_workers_killed_under_load_cost_no_signature(group, files):
    """One of two is killed, time and again, while requests stream; each is answered, and each answer is right."""
    async with SignerPool([group.endpoints], sign_deadline_s=20) as pool:
        await pool.wait_ready(30)
        killed = 0
        signatures = 0

        async def client() -> None:
            nonlocal signatures
            while killed < 5:
                signature = await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)
                public_key = files.private_keys["www"].public_key()
                assert is_signature_valid(public_key, SCHEME, CERTIFICATE_VERIFY, signature.value)
                signatures += 1

        clients = [asyncio.ensure_future(client()) for _ in range(20)]
        for _ in range(5):
            victim = group.pids[0]
            before = signatures
            await wait_for(lambda before=before: signatures > before + 100)
            os.kill(victim, signal.SIGKILL)
            await wait_for(lambda victim=victim: len(group.pids) == 2 and victim not in group.pids)
            killed += 1
        await asyncio.gather(*clients)


async def test_an_event_loop_that_is_busy_for_long_does_not_blame_the_workers(group):
    def stay_busy() -> None:
        wake.recv(1)
        futures.extend(pool.submit(key, SCHEME, CERTIFICATE_VERIFY) for _ in range(8))
        time.sleep(0.3)  # the workers answer meanwhile, and timers come due

    futures: list[asyncio.Future[Signature]] = []
    store = MetricStore()
    wake, ring = socket.socketpair()
    async with SignerPool([group.endpoints], metrics=store) as pool:
        key = pool.key("www")
        await wait_for(lambda: len(pool._tokens["local"].connections) == 2)
        for _ in range(8):
            await pool.sign(key, SCHEME, CERTIFICATE_VERIFY)
        asyncio.get_running_loop().add_reader(wake, stay_busy)
        for _ in range(3):
            ring.send(b"x")
            await wait_for(lambda: futures)
            await asyncio.gather(*futures)
            futures.clear()
        asyncio.get_running_loop().remove_reader(wake)
    samples = {sample.family.name: sample.values for sample in read_samples(store.fd, metrics.FAMILIES)}
    assert samples["hsm_retries_total"] == (0,)
    for opened in (wake, ring, store):
        opened.close()


@pytest.fixture
def patience(monkeypatch):
    """Requests wait for a restart however long it takes: a machine with other work to do may need its time."""
    monkeypatch.setattr(dispatch, "RESTART_WINDOW_NS", 30_000_000_000)


@pytest.mark.usefixtures("patience")
async def test_after_all_workers_are_killed_requests_wait_for_their_successors(group):
    async with SignerPool([group.endpoints], sign_deadline_s=20) as pool:
        await pool.wait_ready(30)
        for pid in group.pids:
            os.kill(pid, signal.SIGKILL)
        await wait_for(lambda: not pool.tokens_up())
        assert (await pool.sign("www", SCHEME, CERTIFICATE_VERIFY)).token == "local"


@pytest.mark.usefixtures("patience")
async def test_a_worker_killed_loses_no_count_and_keeps_its_socket(group):
    async with SignerPool([group.endpoints], sign_deadline_s=20) as pool:
        for _ in range(3):
            with pytest.raises(PolicyRejected):
                await pool.sign("www", SCHEME, b"a document")
        sockets = [os.stat(path).st_ino for path in group.endpoints.sockets]
        for pid in group.pids:
            os.kill(pid, signal.SIGKILL)
        await wait_for(lambda: not pool.tokens_up())
        with pytest.raises(PolicyRejected):
            await pool.sign("www", SCHEME, b"a document")
    assert [os.stat(path).st_ino for path in group.endpoints.sockets] == sockets
    counts = [
        sample.values[0]
        for fd in group.metric_fds
        for sample in read_samples(fd, metrics.FAMILIES)
        if sample.family is metrics.POLICY_REJECTED
    ]
    assert sum(counts) == 4


async def test_a_refused_pin_is_tried_once_whatever_the_number_of_workers(tmp_path, files, caplog):
    files.pin_file.write_text("swordfish\n")
    group = WorkerGroup(soft_token(files, workers=3), str(tmp_path / "run"))
    group.start()
    with pytest.raises(WorkerFailed, match="PIN"):
        await group.wait_ready(30)
    await asyncio.sleep(0.3)
    assert group.pids == ()
    assert group.failure is not None
    assert "swordfish" not in group.failure
    assert len([record for record in caplog.records if "failed for good" in record.getMessage()]) == 1
    await group.stop()


async def test_after_a_refused_pin_no_worker_of_the_token_is_started_again(tmp_path, files, caplog):
    group = WorkerGroup(soft_token(files, workers=3), str(tmp_path / "run"))
    group.start()
    await group.wait_ready(30)
    files.pin_file.write_text("swordfish\n")
    first, second, third = group.pids
    os.kill(first, signal.SIGKILL)
    await wait_for(lambda: group.failure is not None)
    os.kill(second, signal.SIGKILL)
    await wait_for(lambda: group.pids == (third,))
    await asyncio.sleep(0.3)
    assert group.pids == (third,)
    assert len([record for record in caplog.records if "failed for good" in record.getMessage()]) == 1
    await group.stop()


async def test_what_a_worker_says_when_it_cannot_start_reaches_the_caller(tmp_path, files):
    files.path.unlink()
    with pytest.raises(WorkerFailed, match=str(files.path)):
        async with open_pool([soft_token(files)]):
            pass


async def test_a_worker_that_ends_without_a_word_is_told_of_by_its_exit_code(tmp_path, files, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    group = WorkerGroup(soft_token(files), str(tmp_path / "run"))
    group.start()
    await wait_for(lambda: group.last_error == "it ended with exit code 1")
    with pytest.raises(WorkerFailed, match=r"token local: its worker is not ready after .* it ended with exit code 1"):
        await group.wait_ready(0.01)
    assert group.failure is None
    await group.stop()


async def test_workers_end_with_their_group_and_leave_no_socket(tmp_path, files):
    group = WorkerGroup(soft_token(files), str(tmp_path / "run"))
    group.start()
    await group.wait_ready(30)
    (pid,) = group.pids
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run" / "local-0.sock").stat().st_mode & 0o777 == 0o600
    await group.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list((tmp_path / "run").iterdir()) == []


async def test_a_worker_that_does_not_end_is_killed(tmp_path, files):
    group = WorkerGroup(soft_token(files), str(tmp_path / "run"))
    group.start()
    await group.wait_ready(30)
    (pid,) = group.pids
    os.kill(pid, signal.SIGSTOP)
    await group.stop(grace_s=0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_socket_directory_that_others_may_enter_is_refused(tmp_path, files):
    (tmp_path / "run").mkdir(mode=0o755)
    with pytest.raises(TokenConfigError, match=r"expected a directory of uid .* with mode 0700; got 'd', .* mode 0755"):
        WorkerGroup(soft_token(files), str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "directory", "message"),
    [("../x", "run", "token name '../x'"), ("x", "r" * 100, "at most 107 bytes")],
)
async def test_names_that_make_no_socket_path_are_refused(tmp_path, files, name, directory, message):
    with pytest.raises(TokenConfigError, match=message):
        WorkerGroup(soft_token(files, name=name), str(tmp_path / directory))
