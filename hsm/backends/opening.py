"""What a backend does while it opens its token, one step after another, told to whoever must know where it hangs.

A library that never returns from C_Login cannot say so: the step before is the last that is heard of it. Nothing is
told unless somebody listens, which a worker does until it serves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[str], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Call `listener` before each step that this thread takes while the context lasts."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def step(name: str) -> None:
    """Tell that this is what comes now: a function of the token's library, or a few words."""
    listener = _listener.get()
    if listener is not None:
        listener(name)
