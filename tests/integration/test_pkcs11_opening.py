"""A token that hangs while its worker opens it: the worker is killed and tried again, and other tokens serve on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hsm.launcher import WorkerGroup
from hsm.messages import KeyType
from tests.backends import backend
from tests.fault_module import On
from tests.proxy import Proxy, log_events, make_site, running_proxy, site_config
from tests.softhsm import FaultyToken

KEYS = {"www": KeyType.ECDSA_P256}
STEPS = {On.INITIALIZE: "C_Initialize", On.OPEN_SESSION: "C_OpenSession", On.LOGIN: "C_Login"}
OPEN_TIMEOUT_S = 2.0
KILLED = re.compile(
    r"token hsm: worker \d+ ended with signal SIGKILL: it hangs while opening the token: (\w+) for 2 s; "
    "another is started"
)


@contextlib.asynccontextmanager
async def started(token: FaultyToken, directory: Path) -> AsyncIterator[WorkerGroup]:
    group = WorkerGroup(token.launchable(), str(directory / "run"), open_timeout_s=OPEN_TIMEOUT_S)
    group.start()
    try:
        yield group
    finally:
        await group.stop()


async def until(condition: Callable[[], Any]) -> None:
    async def poll() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    await asyncio.wait_for(poll(), 60)


def steps_killed_at(messages: list[str]) -> list[str]:
    return [match[1] for message in messages if (match := KILLED.fullmatch(message))]


@pytest.mark.parametrize("hanging", STEPS, ids=STEPS.values())
async def test_a_worker_that_hangs_in_a_step_is_killed_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hanging: On
) -> None:
    caplog.set_level(logging.WARNING)
    step = STEPS[hanging]
    token = FaultyToken(tmp_path)
    token.faults.hang(hanging)
    async with started(token, tmp_path) as group:
        await until(lambda: step in group.last_error)
        assert group.last_error == f"it has not opened the token yet ({step})"
        await until(lambda: steps_killed_at(caplog.messages).count(step) == 2)
        assert group.last_error == f"it hangs while opening the token: {step} for 2 s"
        token.faults.recover()
        await group.wait_ready(60)


async def test_opening_that_is_slow_and_goes_on_is_let_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = FaultyToken(tmp_path, {"rsa": KeyType.RSA_2048})
    token.faults.set_sign_latency(0.5)  # each of the six schemes is tried once
    async with started(token, tmp_path) as group:
        await group.wait_ready(60)
    assert token.faults.get("sign_calls") == 6
    assert "C_Sign" not in steps_killed_at(caplog.messages)


async def test_the_proxy_starts_and_serves_while_a_token_hangs_and_uses_it_once_it_opens(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    token = FaultyToken(tmp_path, KEYS)
    token.faults.hang(On.LOGIN)
    async with backend() as upstream:
        config = site_config(tmp_path, KEYS, f"127.0.0.1:{upstream.port}")
        config["hsm"]["open_timeout"] = f"{OPEN_TIMEOUT_S:g}s"
        config["hsm"]["tokens"].append(
            {
                "name": "hsm",
                "kind": "pkcs11",
                "module": str(token.faults.path),
                "token_label": "hsm",
                "pin_file": str(token.pin_file),
            }
        )
        async with running_proxy(tmp_path, config) as proxy:
            assert await tokens_up(proxy) == {"local": True, "hsm": False}
            assert await proxy.get() == (200, b"hello")
            await proxy.until(lambda: "C_Login" in steps_killed_at(warnings(proxy)), "killed while logging in")
            assert await proxy.get() == (200, b"hello")
            token.faults.recover()

            async def is_up() -> bool:
                return await tokens_up(proxy) == {"local": True, "hsm": True}

            await proxy.until(is_up, "up")
            assert await proxy.get() == (200, b"hello")


async def tokens_up(proxy: Proxy) -> dict[str, bool]:
    status, body = await proxy.admin("/readyz")
    assert status == 200
    tokens: dict[str, bool] = json.loads(body)["tokens"]
    return tokens


def warnings(proxy: Proxy) -> list[str]:
    return [event["event"] for event in log_events(proxy.log) if event["level"] == "warning"]
