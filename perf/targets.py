"""What this proxy is meant to achieve, as ratios within one report, and whether it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from perf.parts import Part, Table
from perf.setups.base import PROXY_ROLE
from perf.turns import Case

_OWN = "tlsproxy-pkcs11"


@dataclass(frozen=True, slots=True)
class Target:
    """One aim, and what was measured."""

    name: str
    bound: float
    is_floor: bool
    """The value must be at least the bound, not at most."""
    value: float

    @property
    def met(self) -> bool:
        """Whether it is; a value that is not there (NaN) meets nothing."""
        return self.value >= self.bound if self.is_floor else self.value <= self.bound


def judge(parts: Mapping[str, Sequence[Part]]) -> list[Target]:
    """The targets for which `parts`, by the run of `perf.compare` that they come from, have what is needed."""
    return [target for run, check in _CHECKS.items() for part in parts.get(run, ()) for target in check(part)]


def targets_table(targets: Sequence[Target]) -> Table:
    """All of them."""
    rows = [
        (
            target.name,
            f"{'at least' if target.is_floor else 'at most'} {target.bound:g}",
            f"{target.value:.3g}",
            "met" if target.met else "**missed**",
        )
        for target in targets
    ]
    return Table(("target", "wanted", "measured", ""), rows)


def _hsm_latency(part: Part) -> Iterator[Target]:
    results = part.series["handshakes"]
    own = {latency_s: series for (name, latency_s), series in results.items() if name == _OWN}
    for latency_s, least in ((0.001, 2.5), (0.005, 8.0), (0.020, 30.0)):
        at = f"at {latency_s * 1e3:g} ms of HSM latency"
        rate = own[latency_s].per_second
        yield Target(f"handshakes/s {at}, of those at 0 ms", 0.9, True, rate / own[0.0].per_second)
        yield Target(
            f"handshakes/s {at}, x nginx + engine",
            least,
            True,
            rate / results[Case("nginx-pkcs11", latency_s)].per_second,
        )
    ratio = own[0.020].cpu_s() / results[Case("stunnel-pkcs11", 0.020)].cpu_s()
    yield Target("CPU per handshake at 20 ms of HSM latency, x stunnel + engine", 0.6, False, ratio)


def _storm(part: Part) -> Iterator[Target]:
    series = part.series["storm"][Case(_OWN, 0.020)]
    unserved = sum(turn.probes_asked for turn in series) - series.probes.count
    yield Target("storm at 20 ms: requests of the established connection not served", 0, False, unserved)
    yield Target("storm at 20 ms: their p99, ms", 10, False, series.probes.quantile_s(0.99) * 1e3)
    yield Target("storm at 20 ms: handshakes/s meanwhile", 600, True, series.per_second)


def _key_in_softhsm(part: Part) -> Iterator[Target]:
    results = part.series["handshakes"]
    ratio = results[Case(_OWN)].cpu_s() / results[Case("nginx-pkcs11")].cpu_s()
    bound = 1.05 if "rsa" in part.title else 1.15
    yield Target(f"CPU of all processes, SoftHSM2 at 0 ms, x nginx + engine, {_key_type(part)}", bound, False, ratio)


def _key_in_memory(part: Part) -> Iterator[Target]:
    results = part.series["handshakes"]
    ratio = results[Case("tlsproxy")].cpu_s(PROXY_ROLE) / results[Case("nginx")].cpu_s(PROXY_ROLE)
    yield Target(f"CPU of the proxy alone, soft token, x nginx with a key file, {_key_type(part)}", 1.05, False, ratio)


def _key_type(part: Part) -> str:
    return part.title.rpartition(", ")[2]


def _requests(part: Part) -> Iterator[Target]:
    results = part.series["requests"]
    nginx = results[Case("nginx")].cpu_s(PROXY_ROLE)
    yield Target("CPU per small request, x nginx", 3.2, False, results[Case("tlsproxy")].cpu_s(PROXY_ROLE) / nginx)
    ratio = results[Case("tlsproxy-tcp")].cpu_s(PROXY_ROLE) / nginx
    yield Target("CPU per small request, mode tcp, x nginx", 1.1, False, ratio)


def _bulk(part: Part) -> Iterator[Target]:
    results = part.series["bulk"]
    ratio = results[Case("tlsproxy")].cpu_s(PROXY_ROLE) / results[Case("nginx")].cpu_s(PROXY_ROLE)
    yield Target(f"{part.title}: CPU per GB, x nginx", 1.0, False, ratio)


def _idle(part: Part) -> Iterator[Target]:
    yield Target("KB of memory for an idle TLS connection", 40, False, part.figures["tlsproxy"] * 1.024)


_CHECKS: dict[str, Callable[[Part], Iterator[Target]]] = {
    "HSM latency": _hsm_latency,
    "storm": _storm,
    "key in SoftHSM2": _key_in_softhsm,
    "key in memory": _key_in_memory,
    "requests": _requests,
    "bulk": _bulk,
    "bulk uploads": _bulk,
    "idle": _idle,
}
