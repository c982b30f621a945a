"""The load loop, with exchanges on sockets that are always ready."""

from __future__ import annotations

import selectors
import socket
import ssl
import time
from pathlib import Path
from typing import cast

from perf.load import Load, LoadResult, drive, merged, shares


def load(**fields) -> Load:
    defaults = {"host": "h", "port": 1, "server_name": "h", "ca_file": Path("ca"), "seconds": 0.05, "concurrency": 2}
    return Load(**{**defaults, "rate": None, **fields})


class Work:
    """An exchange that takes as long as it is told."""

    takes_s = 0.0
    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.tls = cast("ssl.SSLSocket", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.done_s = 0.0

    def begin(self) -> int:
        return selectors.EVENT_WRITE

    def advance(self) -> int:
        time.sleep(self.takes_s)
        self.done_s = time.perf_counter()
        return 0

    def add_to(self, result: LoadResult) -> None:
        result.received_bytes += 1


def test_reusable_exchanges_are_made_once_and_used_over_and_over():
    class Reused(Work):
        made = 0

    result = drive(load(concurrency=3), Reused, lambda: None, reusable=True)
    assert Reused.made == 3
    assert result.completed > 3
    assert result.latencies.count == result.completed == result.received_bytes
    assert not result.failures


def test_others_are_made_anew_each_time():
    class Fresh(Work):
        made = 0

    result = drive(load(), Fresh, lambda: None, reusable=False)
    assert result.completed == Fresh.made > 1


def test_connections_are_ready_before_the_load_begins():
    class Reused(Work):
        made = 0

    seen = []
    drive(load(), Reused, lambda: seen.append(Reused.made), reusable=True)
    assert seen == [2]


def test_in_an_open_loop_latency_counts_from_when_an_exchange_was_due():
    class Slow(Work):
        takes_s = 0.02

    # A hundred due in 100 ms, five can be done: the last of them waited for most of the time.
    result = drive(load(seconds=0.1, concurrency=1, rate=1000), Slow, lambda: None, reusable=True)
    assert result.latencies.max_s > 0.06
    assert result.failures["never begun"] > 50


def test_a_closed_loop_charges_each_exchange_only_with_itself():
    class Slow(Work):
        takes_s = 0.02

    result = drive(load(seconds=0.1, concurrency=1), Slow, lambda: None, reusable=True)
    assert result.latencies.quantile_s(0.5) >= 0.02
    assert not result.failures


def test_what_fails_is_counted_by_reason_and_made_anew():
    class Failing(Work):
        def advance(self) -> int:
            raise ConnectionResetError

    result = drive(load(), Failing, lambda: None, reusable=True)
    assert result.completed == 0
    assert result.failures["ConnectionResetError"] > 2


def test_shares_add_up_to_the_load():
    parts = shares(load(concurrency=7, rate=90.0), 3)
    assert [part.concurrency for part in parts] == [3, 2, 2]
    assert sum(part.rate or 0 for part in parts) == 90
    assert len({part.seed for part in parts}) == 3


def test_merged_adds_counts_and_takes_the_slowest_and_the_busiest():
    total = merged(
        [
            LoadResult(completed=10, elapsed_s=1.0, client_busy=0.3, client_cpu_s=0.3),
            LoadResult(completed=20, elapsed_s=2.0, client_busy=0.2, client_cpu_s=0.4),
        ]
    )
    assert (total.completed, total.elapsed_s, total.client_busy, total.client_cpu_s) == (30, 2.0, 0.3, 0.7)
    assert total.per_second == 15
