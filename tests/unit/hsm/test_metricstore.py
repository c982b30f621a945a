from __future__ import annotations

import json
import mmap
import os
import random
import struct

import pytest

from hsm.metricstore import OTHER, Family, Kind, MetricStore, Sample, create_store, read_samples

REQUESTS = Family("t_requests_total", Kind.COUNTER, "Requests.", ("token", "result"), max_label_sets=3)
PENDING = Family("t_pending", Kind.GAUGE, "Pending.", ("token",))
DURATION = Family("t_duration_seconds", Kind.HISTOGRAM, "Duration.", ("token",), buckets=(0.1, 1.0))
FAMILIES = {family.name: family for family in (REQUESTS, PENDING, DURATION)}


@pytest.fixture
def store():
    store = MetricStore()
    yield store
    store.close()


def read(store: MetricStore) -> dict[tuple[str, ...], tuple[float, ...]]:
    return {(sample.family.name, *sample.labels): sample.values for sample in read_samples(store.fd, FAMILIES)}


def test_counts_are_read_back_by_family_and_labels(store):
    store.values[store.counter(REQUESTS, ("a", "ok"))] += 2
    store.values[store.counter(REQUESTS, ("a", "ok"))] += 1
    store.values[store.gauge(PENDING, ("a",))] = -4
    histogram = store.histogram(DURATION, ("a",))
    for value in (0.1, 0.11, 7.0):
        histogram.observe(value)
    assert read_samples(store.fd, FAMILIES) == [
        Sample(REQUESTS, ("a", "ok"), (3.0,)),
        Sample(PENDING, ("a",), (-4.0,)),
        Sample(DURATION, ("a",), (1.0, 1.0, 1.0, pytest.approx(7.21))),
    ]


def test_a_successor_goes_on_counting_and_starts_its_gauges_from_zero(store):
    store.values[store.counter(REQUESTS, ("a", "ok"))] += 5
    store.values[store.gauge(PENDING, ("a",))] = 9
    successor = MetricStore(os.dup(store.fd))
    successor.values[successor.counter(REQUESTS, ("a", "ok"))] += 1
    successor.values[successor.counter(REQUESTS, ("b", "ok"))] += 1
    successor.close()
    assert read(store) == {
        ("t_requests_total", "a", "ok"): (6.0,),
        ("t_pending", "a"): (0.0,),
        ("t_requests_total", "b", "ok"): (1.0,),
    }


def test_label_sets_beyond_the_cap_fold_into_other(store):
    for n in range(10):
        store.values[store.counter(REQUESTS, (str(n), "ok"))] += 1
    assert read(store)[("t_requests_total", OTHER, OTHER)] == (7.0,)
    assert len(read(store)) == 4


def test_labels_that_could_not_be_exported_fold_into_other(store):
    for label in ("x" * 129, "a\nb", "\ud800"):
        store.values[store.counter(REQUESTS, (label, "ok"))] += 1
    assert read(store) == {("t_requests_total", OTHER, OTHER): (3.0,)}


def test_a_full_store_goes_on_counting_into_scrap():
    store = MetricStore(slots=66)
    for token in "abc":
        store.values[store.counter(REQUESTS, (token, "ok"))] += 1
        store.histogram(DURATION, (token,)).observe(1.0)
    assert read(store) == {("t_requests_total", "a", "ok"): (1.0,), ("t_requests_total", "b", "ok"): (1.0,)}
    store.close()


def test_misuse_is_named(store):
    with pytest.raises(ValueError, match="t_pending is a gauge, not a counter"):
        store.counter(PENDING, ("a",))
    with pytest.raises(ValueError, match="2 values given"):
        store.gauge(PENDING, ("a", "b"))
    with pytest.raises(ValueError, match="rising buckets"):
        Family("x", Kind.HISTOGRAM, "x", buckets=(2.0, 1.0))
    with pytest.raises(ValueError, match="slots; 65 to"):
        create_store(1)


def test_a_file_that_is_no_store_is_refused_and_reads_empty():
    fd = os.memfd_create("other")
    try:
        assert read_samples(fd, FAMILIES) == []
        with pytest.raises(ValueError, match="is not a metric store"):
            MetricStore(fd)
    finally:
        os.close(fd)


def test_a_holder_of_the_memfd_cannot_resize_it(store):
    with pytest.raises(PermissionError):
        os.ftruncate(store.fd, 0)


RECORD = [REQUESTS.name, ["a", "ok"], 64, 1, "counter"]


@pytest.mark.parametrize(
    "record",
    [
        [REQUESTS.name, ["a", "ok"], 63, 1, "counter"],
        [REQUESTS.name, ["a", "ok"], -1, 1, "counter"],
        [REQUESTS.name, ["a", "ok"], 1 << 40, 1, "counter"],
        [REQUESTS.name, ["a", "ok"], 64, 2, "counter"],
        [REQUESTS.name, ["a"], 64, 1, "counter"],
        [REQUESTS.name, ["a", 1], 64, 1, "counter"],
        [REQUESTS.name, ["a", "\n"], 64, 1, "counter"],
        [REQUESTS.name, "ab", 64, 1, "counter"],
        [REQUESTS.name, ["a", "ok"], True, 1, "counter"],
        ["unheard_of", [], 64, 1, "counter"],
        [REQUESTS.name, ["a", "ok"], 64, 1, None],
        [REQUESTS.name],
        7,
    ],
)
def test_a_hostile_record_is_left_out(record):
    fd = create_store()
    _forge(fd, record)
    try:
        assert read_samples(fd, FAMILIES) == []
        _forge(fd, RECORD)
        assert len(read_samples(fd, FAMILIES)) == 1
    finally:
        os.close(fd)


def test_values_that_are_no_numbers_or_add_up_to_none_are_left_out(store):
    store.values[store.counter(REQUESTS, ("a", "ok"))] = -1.0
    store.values[store.gauge(PENDING, ("a",))] = float("nan")
    store.values[store.gauge(PENDING, ("b",))] = float("inf")
    store.values[store.gauge(PENDING, ("c",))] = -1e308
    store.values[store.counter(REQUESTS, ("b", "ok"))] = 1e308
    assert read(store) == {}


def test_a_hostile_writer_cannot_make_label_sets_without_end():
    fd = create_store()
    _forge(fd, *([REQUESTS.name, [str(n), "ok"], 64 + n, 1, "counter"] for n in range(100)))
    assert len(read_samples(fd, FAMILIES)) == REQUESTS.max_label_sets + 1
    os.close(fd)


def test_random_damage_neither_raises_nor_stops_a_successor():
    rng = random.Random(5)
    for _ in range(300):
        store = MetricStore(slots=128)
        for token in "abc":
            store.histogram(DURATION, (token,)).observe(1.0)
        offset = 64 + 128 * 8
        with mmap.mmap(store.fd, 0) as whole:
            for _ in range(3):
                whole[rng.choice([rng.randrange(20), offset + rng.randrange(200)])] = rng.randrange(256)
        read_samples(store.fd, FAMILIES)
        try:
            successor = MetricStore(os.dup(store.fd))
        except ValueError:
            pass
        else:
            successor.values[successor.counter(REQUESTS, ("a", "ok"))] += 1
            assert read(successor)[(REQUESTS.name, "a", "ok")] == (1.0,)
            successor.close()
        store.close()


@pytest.mark.parametrize("count", [-(10**9), 0, 65])
def test_a_hostile_count_of_slots_costs_what_was_counted_and_no_more(count):
    fd = create_store()
    _forge(fd, ["a", [], 64, count, "counter"], ["b", [], 64 + count, 1, "gauge"])
    successor = MetricStore(fd)
    assert successor.counter(REQUESTS, ("a", "ok")) == 64
    successor.close()


def _forge(fd: int, *records: object) -> None:
    bodies = [json.dumps(record).encode() for record in records]
    directory = b"".join(struct.pack("<I", len(body)) + body for body in bodies)
    os.pwrite(fd, directory, 64 + 16384 * 8)
    os.pwrite(fd, struct.pack("<I", len(directory)), 16)
