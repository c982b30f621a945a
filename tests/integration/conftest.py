from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

_FACTORIES: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run a module's async tests once on each loop it names in EVENT_LOOPS."""
    names = getattr(item.getparent(pytest.Module).obj, "EVENT_LOOPS", ("asyncio",))
    return {name: _FACTORIES[name] for name in names}
