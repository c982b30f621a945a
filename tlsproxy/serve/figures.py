"""What the supervisor tells of itself and its workers: the metrics of all processes, and the state at one moment.

Counters only ever grow, whatever becomes of processes: what a worker has counted is kept when it is gone for good.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from time import monotonic, time
from typing import Any

from prometheus_client import CollectorRegistry

import tlsproxy
from hsm.metrics import CIRCUIT_STATE, TOKEN_UP
from hsm.metrics import FAMILIES as HSM_FAMILIES
from hsm.metricstore import Family, MetricStore, read_samples
from tlsproxy import metrics
from tlsproxy.metrics import Merged, StoreCollector, merge_stores
from tlsproxy.serve import rates
from tlsproxy.serve.anatomy import SlowHandshake, slowest
from tlsproxy.serve.generation import Generation
from tlsproxy.serve.snapshot import CertificateView, ListenerView, Snapshot, WorkerView
from tlsproxy.serve.status import status_document
from tlsproxy.tls._openssl import LIBRARY_VERSION

_FAMILIES = {**metrics.FAMILIES, **HSM_FAMILIES}


class Figures:
    """Reads the metric stores of the generations; the first of these is the one in force, the others are draining."""

    def __init__(self, generations: Callable[[], Sequence[Generation]]) -> None:
        self._generations = generations
        self._store = MetricStore()
        self._gone = MetricStore()
        self._window = rates.Window()
        self._restarts = self._store.counter(metrics.WORKER_RESTARTS)
        build = (tlsproxy.__version__, platform.python_version(), LIBRARY_VERSION)
        self._store.values[self._store.gauge(metrics.BUILD_INFO, build)] = 1.0
        self.registry = CollectorRegistry()
        """All metrics, for the admin port."""
        self.registry.register(StoreCollector(_FAMILIES, self._fds))

    def close(self) -> None:
        """Let go of the shared memory."""
        self._store.close()
        self._gone.close()

    def absorb(self, fd: int) -> None:
        """Keep what is counted in the store behind `fd`, which is about to be closed."""
        for sample in read_samples(fd, _FAMILIES):
            self._gone.add(sample)

    def count_restart(self) -> None:
        """Count a proxy worker started in place of another."""
        self._store.values[self._restarts] += 1.0

    def ticket_key_made(self) -> None:
        """Take note that session tickets are encrypted with a new key from now on."""
        self._store.values[self._store.gauge(metrics.TICKET_KEY_CREATED)] = time()

    def count_reload(self, result: str) -> None:
        """Count a reload."""
        self._store.values[self._store.counter(metrics.CONFIG_RELOADS, (result,))] += 1.0

    def take_sample(self) -> None:
        """Remember where the counters stand; to be called every rates.SAMPLE_INTERVAL_S."""
        self._window.add(monotonic(), merge_stores(self._counting_fds(), rates.COUNTED))

    def status(self) -> dict[str, Any]:
        """Return the state of the whole as JSON has it."""
        current, *draining = self._generations()
        circuits: dict[str, dict[str, int]] = {}
        live = (worker.metrics_fd for worker in current.workers if worker.ready)
        for (token, state), (count,) in merge_stores(live, {CIRCUIT_STATE.name: CIRCUIT_STATE})[
            CIRCUIT_STATE.name
        ].items():
            if count:
                circuits.setdefault(token, {})[state] = int(count)
        return status_document(
            self.snapshot(),
            circuits,
            self._window.lately(monotonic(), merge_stores(self._counting_fds(), rates.COUNTED)),
            draining_workers=sum(worker.pid is not None for generation in draining for worker in generation.workers),
        )

    def read(self, families: Mapping[str, Family]) -> Merged:
        """Return the present values of `families`, by name, over all processes."""
        return merge_stores(self._fds(), families)

    def slowest(self) -> list[SlowHandshake]:
        """Return the slowest handshakes of late."""
        return slowest(worker.slowest for generation in self._generations() for worker in generation.workers)

    def snapshot(self) -> Snapshot:
        """Return the state of the whole."""
        current = self._generations()[0]
        handshakes = merge_stores(
            self._counting_fds(), {family.name: family for family in (metrics.HANDSHAKES, metrics.CONNECTIONS)}
        )
        return Snapshot(
            version=tlsproxy.__version__,
            workers=tuple(WorkerView(worker.index, worker.pid, worker.ready) for worker in current.workers),
            tokens=_tokens_up(current),
            certificates=tuple(
                CertificateView(
                    name,
                    material.certificate.dns_names,
                    material.certificate.key_type.value,
                    material.config.tokens,
                    material.certificate.not_after,
                )
                for name, material in current.materials.items()
            ),
            listeners=tuple(_listener_view(str(listener.address), handshakes) for listener in current.config.listeners),
        )

    def _counting_fds(self) -> list[int]:
        """Return the stores of proxy workers, those that are gone included."""
        workers = (worker for generation in self._generations() for worker in generation.workers)
        return [self._gone.fd, *(worker.metrics_fd for worker in workers if not worker.closed)]

    def _fds(self) -> list[int]:
        generations = self._generations()
        slot = self._store.gauge(metrics.WORKERS_READY)
        self._store.values[slot] = sum(worker.ready for worker in generations[0].workers)
        # Generations share the workers of a token that has not changed.
        tokens = dict.fromkeys(fd for generation in generations for fd in generation.tokens.metrics_fds)
        return [self._store.fd, generations[0].own_metrics_fd, *self._counting_fds(), *tokens]


def _tokens_up(generation: Generation) -> dict[str, bool]:
    """A worker that is being replaced reaches no token: only those that serve clients are asked."""
    up = {token.name: False for token in generation.config.hsm.tokens}
    for worker in generation.workers:
        if worker.ready:
            for sample in read_samples(worker.metrics_fd, {TOKEN_UP.name: TOKEN_UP}):
                if sample.labels[0] in up and sample.values[0] >= 1.0:
                    up[sample.labels[0]] = True
    return up


def _listener_view(address: str, merged: Mapping[str, Mapping[tuple[str, ...], tuple[float, ...]]]) -> ListenerView:
    results = {True: 0.0, False: 0.0}
    for (listener, result, *_), (count,) in merged[metrics.HANDSHAKES.name].items():
        if listener == address:
            results[result == "ok"] += count
    (open_connections,) = merged[metrics.CONNECTIONS.name].get((address,), (0.0,))
    return ListenerView(address, int(open_connections), int(results[True]), int(results[False]))
