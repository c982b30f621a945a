from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metricstore import MetricStore
from tlsproxy import metrics
from tlsproxy.metrics import FAMILIES, StoreCollector


@pytest.fixture
def stores() -> Iterator[tuple[MetricStore, MetricStore]]:
    pair = MetricStore(slots=4096), MetricStore(slots=4096)
    yield pair
    for store in pair:
        store.close()


def page(*stores: MetricStore) -> list[str]:
    registry = CollectorRegistry()
    registry.register(StoreCollector(FAMILIES, lambda: [store.fd for store in stores]))
    return generate_latest(registry).decode().splitlines()


def test_counters_of_all_processes_are_summed(stores: tuple[MetricStore, MetricStore]) -> None:
    labels = ("0.0.0.0:8443", "ok", "no", "TLSv1.3")
    for store, count in zip(stores, (3, 4), strict=True):
        store.values[store.counter(metrics.HANDSHAKES, labels)] += count
    assert (
        'tlsproxy_handshakes_total{listener="0.0.0.0:8443",result="ok",resumed="no",tls_version="TLSv1.3"} 7.0'
    ) in page(*stores)


def test_histograms_are_summed_and_cumulative(stores: tuple[MetricStore, MetricStore]) -> None:
    for store in stores:
        histogram = store.histogram(metrics.EVENT_LOOP_LAG)
        histogram.observe(0.002)
        histogram.observe(99.0)
    lines = page(*stores)
    assert 'tlsproxy_event_loop_lag_seconds_bucket{le="0.001"} 0.0' in lines
    assert 'tlsproxy_event_loop_lag_seconds_bucket{le="0.0025"} 2.0' in lines
    assert 'tlsproxy_event_loop_lag_seconds_bucket{le="1.0"} 2.0' in lines
    assert 'tlsproxy_event_loop_lag_seconds_bucket{le="+Inf"} 4.0' in lines
    assert "tlsproxy_event_loop_lag_seconds_count 4.0" in lines
    assert "tlsproxy_event_loop_lag_seconds_sum 198.004" in lines


def test_gauges_merge_as_their_family_says(stores: tuple[MetricStore, MetricStore]) -> None:
    for store, count in zip(stores, (3, 5), strict=True):
        store.values[store.gauge(metrics.CONNECTIONS, ("a:1",))] = count
        store.values[store.gauge(metrics.CERTIFICATE_NOT_AFTER, ("www",))] = count
        store.values[store.gauge(metrics.BUILD_INFO, ("1", "2", "3"))] = 1
    lines = page(*stores)
    assert 'tlsproxy_connections{listener="a:1"} 8.0' in lines
    assert 'tlsproxy_certificate_not_after_timestamp_seconds{certificate="www"} 3.0' in lines
    assert 'tlsproxy_build_info{openssl="3",python="2",version="1"} 1.0' in lines


def test_a_store_gone_bad_costs_only_its_own_counts(stores: tuple[MetricStore, MetricStore]) -> None:
    good, bad = stores
    for store in stores:
        store.values[store.counter(metrics.CONNECTIONS_ACCEPTED, ("a:1",))] += 1
    os.pwrite(bad.fd, b"\xff" * 64, 0)
    assert 'tlsproxy_connections_accepted_total{listener="a:1"} 1.0' in page(good, bad)


def test_every_family_is_named_by_its_metric_and_none_twice() -> None:
    for name, family in FAMILIES.items():
        assert name == family.name
        assert name.startswith("tlsproxy_")
        assert name.endswith("_total") == (family.kind.value == "counter")
    assert not FAMILIES.keys() & HSM_FAMILIES.keys()
    declared = {value.name for value in vars(metrics).values() if isinstance(value, metrics.Family)}
    assert declared == set(FAMILIES)
