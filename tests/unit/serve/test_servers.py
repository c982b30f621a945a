"""Which server is next, and when one is ejected."""

from __future__ import annotations

from collections import Counter

from tlsproxy.config import Address, EjectionConfig, ServerConfig
from tlsproxy.serve.servers import ConsistentHash, LeastConnections, RoundRobin, Server


def make(*weights: int, max_connections: int = 0) -> list[Server]:
    addresses = [Address("127.0.0.1", 8000 + i) for i in range(len(weights))]
    return [
        Server(ServerConfig(address, weight, max_connections), address)
        for address, weight in zip(addresses, weights, strict=True)
    ]


def keys(count: int) -> list[bytes]:
    return [b"client-%d" % i for i in range(count)]


def test_round_robin_takes_turns() -> None:
    servers = make(1, 1, 1)
    balancer = RoundRobin()
    picked = [servers.index(balancer.pick(servers, b"")) for _ in range(7)]
    assert picked == [0, 1, 2, 0, 1, 2, 0]


def test_round_robin_obeys_weights_and_spreads_them() -> None:
    servers = make(5, 1, 1)
    balancer = RoundRobin()
    picked = [servers.index(balancer.pick(servers, b"")) for _ in range(14)]
    assert Counter(picked) == {0: 10, 1: 2, 2: 2}
    assert "000000" not in "".join(map(str, picked))


def test_least_connections_counts_what_is_in_use_for_its_weight() -> None:
    servers = make(1, 2)
    balancer = LeastConnections()
    servers[0].in_use, servers[1].in_use = 2, 3
    assert balancer.pick(servers, b"") is servers[1]
    servers[1].in_use = 5
    assert balancer.pick(servers, b"") is servers[0]


def test_least_connections_takes_turns_among_equals() -> None:
    servers = make(1, 1)
    balancer = LeastConnections()
    assert {balancer.pick(servers, b"") for _ in range(2)} == set(servers)


def test_a_key_stays_with_its_server_when_others_come_and_go() -> None:
    servers = make(1, 1, 1, 1)
    balancer = ConsistentHash()
    before = {key: balancer.pick(servers, key) for key in keys(1000)}
    gone = servers[2]
    after = {key: balancer.pick([s for s in servers if s is not gone], key) for key in keys(1000)}
    assert all(after[key] is server for key, server in before.items() if server is not gone)
    assert set(after.values()) == set(servers) - {gone}


def test_the_hash_spreads_keys_by_weight() -> None:
    servers = make(1, 3)
    balancer = ConsistentHash()
    counts = Counter(servers.index(balancer.pick(servers, key)) for key in keys(4000))
    assert 800 < counts[0] < 1200


def test_the_hash_is_the_same_in_every_process_and_release() -> None:
    servers = make(1, 1, 1)
    assert [servers.index(ConsistentHash().pick(servers, key)) for key in keys(8)] == [0, 0, 0, 1, 0, 1, 1, 0]


def test_ejection_after_failures_in_a_row() -> None:
    (server,) = make(1)
    ejection = EjectionConfig(3, 10)
    assert not server.failed(ejection, 100)
    assert not server.failed(ejection, 100)
    assert not server.succeeded()
    assert [server.failed(ejection, 100) for _ in range(3)] == [False, False, True]
    assert server.ejected_until_s == 110
    # Requests that were under way may still fail: they don't make it longer.
    assert not server.failed(ejection, 105)
    assert server.ejected_until_s == 110
    # Once back, one more failure is enough.
    assert server.failed(ejection, 111)
    assert server.ejected_until_s > 121


def test_a_server_that_stays_away_is_ejected_for_longer_and_longer_until_it_answers() -> None:
    (server,) = make(1)
    ejection = EjectionConfig(1, 10)
    now_s = 100.0
    durations = []
    for _ in range(6):
        assert server.failed(ejection, now_s)
        durations.append(server.ejected_until_s - now_s)
        now_s = server.ejected_until_s
    assert durations == [10, 20, 40, 80, 80, 80]
    assert server.succeeded()
    assert not server.succeeded()
    assert server.failed(ejection, now_s)
    assert server.ejected_until_s == now_s + 10


def test_ejection_can_be_off() -> None:
    (server,) = make(1)
    assert not any(server.failed(EjectionConfig(0, 10), 100) for _ in range(100))


def test_room_is_a_matter_of_connections_in_use() -> None:
    limited, unlimited = (*make(1, max_connections=2), *make(1))
    limited.in_use = unlimited.in_use = 1
    assert limited.has_room
    limited.in_use = unlimited.in_use = 2
    assert not limited.has_room
    assert unlimited.has_room
