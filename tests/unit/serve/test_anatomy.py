from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from tlsproxy.serve import anatomy
from tlsproxy.serve.anatomy import SLOWEST, WINDOW_S, HandshakePhases, SlowestHandshakes, SlowHandshake, slowest

HANDSHAKE = SlowHandshake(
    1.5e9,
    "a:1",
    "TLSv1.3",
    "TLS_AES_128_GCM_SHA256",
    "rsa-2048",
    "hsm-a",
    "rsa_pss_rsae_sha256",
    0.0,
    HandshakePhases(*[0.5] * 6),
)


def taking(*durations: float) -> list[SlowHandshake]:
    return [dataclasses.replace(HANDSHAKE, duration_s=float(duration)) for duration in durations]


def added(handshakes: list[SlowHandshake]) -> SlowestHandshakes:
    kept = SlowestHandshakes()
    for handshake in handshakes:
        kept.add(handshake)
    return kept


def test_only_the_slowest_are_kept() -> None:
    kept = added(taking(*range(150)))
    assert sorted(handshake.duration_s for handshake in kept) == list(range(50, 150))
    assert kept.floor_s == 50


def test_the_floor_rises_only_when_there_is_no_room() -> None:
    assert added(taking(*[5] * (SLOWEST - 1))).floor_s == 0
    assert added(taking(*[5] * SLOWEST)).floor_s == 5


def test_each_is_reported_once() -> None:
    kept = added(taking(1, 2))
    assert sorted(kept.take_new(), key=str) == sorted(taking(1, 2), key=str)
    kept.add(taking(3)[0])
    assert kept.take_new() == taking(3)
    assert kept.take_new() == []


def test_old_ones_make_room_and_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(anatomy, "monotonic", lambda: now[0])
    kept = added(taking(9))
    now[0] += WINDOW_S
    kept.rotate()
    kept.add(taking(1)[0])
    assert sorted(h.duration_s for h in kept) == [1, 9]
    kept.rotate()
    assert sorted(h.duration_s for h in kept) == [1, 9]
    now[0] += WINDOW_S
    kept.rotate()
    assert [h.duration_s for h in kept] == [1]


def test_those_of_a_window_that_ended_are_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = added(taking(9))
    monkeypatch.setattr(anatomy, "monotonic", lambda: 1e9)
    kept.rotate()
    assert kept.take_new() == taking(9)


def test_the_slowest_of_several_come_in_order() -> None:
    several = [added(taking(*range(100))), added(taking(*range(50, 150)))]
    assert [handshake.duration_s for handshake in slowest(several)][:3] == [149, 148, 147]
    assert len(slowest(several)) == SLOWEST


def test_one_passes_through_json() -> None:
    assert SlowHandshake.from_document(json.loads(json.dumps(HANDSHAKE.to_document()))) == HANDSHAKE


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: [],
        lambda document: document | {"more": 1},
        lambda document: {name: value for name, value in document.items() if name != "token"},
        lambda document: document | {"token": "x" * 129},
        lambda document: document | {"token": "\x1b[2J"},
        lambda document: document | {"token": 1},
        lambda document: document | {"duration_s": "1"},
        lambda document: document | {"duration_s": True},
        lambda document: document | {"duration_s": -1},
        lambda document: document | {"duration_s": float("nan")},
        lambda document: document | {"duration_s": 1e400},
        lambda document: document | {"phases": []},
        lambda document: document | {"phases": {**document["phases"], "sign_s": None}},
        lambda document: document | {"phases": {}},
    ],
)
def test_what_is_no_handshake_is_refused(spoil: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SlowHandshake.from_document(spoil(HANDSHAKE.to_document()))


def test_none_is_from_the_future() -> None:
    assert SlowHandshake.from_document(HANDSHAKE.to_document() | {"ended_s": 9e10}).ended_s < 9e10
