"""The supervisor without processes."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from hsm.messages import KeyType
from tests.proxy import site_config
from tlsproxy.config_yaml import parse_config
from tlsproxy.errors import StartupError
from tlsproxy.serve import generation, supervisor
from tlsproxy.serve.control import NewTicketKeys
from tlsproxy.serve.generation import Generation, Host, bring_up
from tlsproxy.serve.sockets import NO_SOCKETS
from tlsproxy.serve.supervisor import Supervisor
from tlsproxy.serve.tokens import TokenGroups


@pytest.fixture
def idle(tmp_path: Path) -> Supervisor:
    settings = site_config(tmp_path, {"www": KeyType.ECDSA_P256}, "127.0.0.1:1")
    config = parse_config(yaml.safe_dump(settings).encode(), "test.yaml", tmp_path)
    return Supervisor("test.yaml", config, {})


@dataclasses.dataclass
class FakeGeneration:
    """Takes note of what its workers would be told."""

    told: list[Any] = dataclasses.field(default_factory=list)

    def send(self, command: Any) -> None:
        self.told.append(command)


async def test_a_new_ticket_key_waits_for_workers_that_are_being_started(
    idle: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have been given the keys of when their start began, and nobody tells them of others before they serve."""
    monkeypatch.setattr(supervisor, "TICKET_KEY_LIFETIME_S", 0.0)
    before = idle._ticket_keys
    started = FakeGeneration()
    async with idle._reloading:
        rotating = asyncio.create_task(idle._rotate_ticket_keys())
        for _ in range(10):
            await asyncio.sleep(0)
        idle._generations.insert(0, cast("Generation", started))
    while not started.told:  # noqa: ASYNC110 - comes in some steps
        await asyncio.sleep(0)
    rotating.cancel()
    first = started.told[0]
    assert isinstance(first, NewTicketKeys)
    assert first.keys[1:] == before
    idle._figures.close()


async def test_what_was_made_before_descriptors_ran_out_is_undone(
    tmp_path: Path, idle: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_store(**options: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(generation, "MetricStore", make_store)
    (tmp_path / "run").mkdir()
    host = Host(tuple, lambda: None, lambda fd: None)
    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(StartupError, match="cannot start the workers: Too many open files"):
        await bring_up(idle._config, {}, None, NO_SOCKETS, host)
    assert os.listdir("/proc/self/fd") == descriptors
    assert list((tmp_path / "run").iterdir()) == []
    idle._figures.close()


async def test_nobody_goes_on_waiting_for_tokens_when_a_start_is_given_up(tmp_path: Path, idle: Supervisor) -> None:
    (tmp_path / "run").mkdir()
    tokens = TokenGroups(idle._config)
    waiting = asyncio.create_task(tokens.wait_ready({}))
    for _ in range(5):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for _ in range(5):
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await tokens.stop()
    idle._figures.close()
