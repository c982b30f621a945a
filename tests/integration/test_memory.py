"""Memory does not grow with bodies: the small form of `make soak`."""

from __future__ import annotations

from pathlib import Path

from tests.soak import LIMIT_BYTES, MB, measure


async def test_bodies_past_a_slow_reader_are_not_held(tmp_path: Path) -> None:
    growth = await measure(tmp_path, 64 * MB)
    assert max(growth) < LIMIT_BYTES, growth
