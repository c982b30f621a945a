from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.tls.peers import Authority, Signer
from tlsproxy.tls.engine import live_jobs


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def signer(authority: Authority) -> Signer:
    return Signer(authority)


@pytest.fixture(autouse=True)
def _no_job_is_left() -> Iterator[None]:
    yield
    assert live_jobs() == 0
