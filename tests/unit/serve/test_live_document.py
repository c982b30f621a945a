from __future__ import annotations

from typing import Any

import pytest

from tlsproxy import metrics
from tlsproxy.serve.live_document import FAMILIES, describe
from tlsproxy.serve.rates import Reading
from tlsproxy.serve.snapshot import ServerView, Snapshot, UpstreamView

LabelSets = dict[tuple[str, ...], tuple[float, ...]]


def snapshot(*servers: ServerView) -> Snapshot:
    return Snapshot("9", (), {}, (), (), (UpstreamView("app", servers),))


def reading(at_s: float, **label_sets: LabelSets) -> Reading:
    """`label_sets` are by the family's name, its prefix left out."""
    return Reading(
        at_s, {name: label_sets.get(name.removeprefix("tlsproxy_").removesuffix("_total"), {}) for name in FAMILIES}
    )


def upstream(readings: list[Reading], *servers: ServerView) -> Any:
    (document,) = describe(readings, snapshot(*servers), ())["upstreams"]
    return document


@pytest.mark.parametrize(
    ("workers", "workers_up", "up", "state"),
    [
        (2, 2, True, "up"),
        (2, 1, False, "down in 1 of 2 workers"),
        (2, 0, False, "down"),
        (0, 0, False, "unknown"),
    ],
)
def test_a_server_is_up_if_every_worker_says_so(workers: int, workers_up: int, up: bool, state: str) -> None:
    server = ServerView("10.0.0.1:80", workers, workers_up, 3)
    assert upstream([reading(1.0)], server)["servers"] == [
        {"address": "10.0.0.1:80", "up": up, "state": state, "ejections": 3}
    ]


def test_servers_are_in_the_order_of_the_configuration() -> None:
    servers = [ServerView(address, 1, 1, 0) for address in ("b:1", "a:1", "unix:/c")]
    assert [server["address"] for server in upstream([reading(1.0)], *servers)["servers"]] == ["b:1", "a:1", "unix:/c"]


def test_an_upstream_has_its_rates_of_the_last_second_and_what_waits_now() -> None:
    def counted(at_s: float, errors: float, retries: float, waiting: float) -> Reading:
        return reading(
            at_s,
            upstream_errors={("app", "connect"): (errors,), ("other", "connect"): (9.0 * errors,)},
            upstream_retries={("app",): (retries,), ("other",): (9.0 * retries,)},
            upstream_waiting={("app",): (waiting,), ("other",): (99.0,)},
        )

    document = upstream([counted(1.0, 0, 0, 50), counted(2.0, 90, 80, 5), counted(3.0, 100, 84, 7)])
    assert (document["errors"], document["retries"], document["waiting"]) == (10, 4, 7)


def test_rates_are_over_a_second_and_quantiles_over_all_readings() -> None:
    family = metrics.HANDSHAKE_DURATION
    nothing, one = (0.0,) * family.slots, (1.0, *(0.0,) * (family.slots - 1))
    label_sets: list[LabelSets] = [{("a", "false", "rsa-2048"): values} for values in (nothing, one, one)]
    readings = [
        reading(float(at_s), handshake_duration_seconds=values, handshakes={("a", "ok", "false", ""): (10.0 * at_s,)})
        for at_s, values in enumerate(label_sets)
    ]
    handshakes = describe(readings, snapshot(), ())["handshakes"]
    assert handshakes["full"] == 10
    assert handshakes["duration"] == pytest.approx([0.00025, 0.000475, 0.000495])


def test_the_first_reading_has_neither() -> None:
    handshakes = describe([reading(1.0, handshakes={("a", "ok", "false", ""): (10.0,)})], snapshot(), ())["handshakes"]
    assert (handshakes["full"], handshakes["duration"]) == (0, None)
