"""How many HSMs and proxy cores a target rate takes, what resumption saves, and what a million handshakes cost.

By simulation of the pool's own code (perf/simulation.py). A deployment is made of equal cells: two tokens with the same
key, and the proxy processes that share them. The highest rate at which a cell keeps the latency objective is searched
by bisection; as cells have nothing to do with each other, a hundred of them do a hundred times as much.
`--validate` holds the simulation against a run on this machine first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hsm.messages import KeyType
from perf.options import add_json_argument
from perf.parts import Part, Table, quantiles_ms
from perf.simulation import HsmModel, Scenario, simulate
from perf.validation import LATENCY_S, SESSIONS, TOKENS, validate

_PUBLISHED: dict[str, dict[KeyType, dict[int, int]]] = {
    "cloudhsm-hsm1.medium": {
        KeyType.RSA_2048: {2: 2000, 3: 3000, 6: 5000},
        KeyType.ECDSA_P256: {2: 500, 3: 750, 6: 1500},
    },
    "cloudhsm-hsm2m.medium": {
        KeyType.RSA_2048: {2: 2000, 3: 3000, 6: 5000},
        KeyType.ECDSA_P256: {2: 3000, 3: 4500, 6: 7000},
    },
}
"""Signatures a second by HSMs in a cluster: docs.aws.amazon.com/cloudhsm/latest/userguide/performance.html."""
_TOKENS_PER_CELL = 2
_PROXIES_PER_CELL = 4
_SEARCH_STEPS = 7
_REQUESTS = 30_000


@dataclass(frozen=True, slots=True, order=True)
class Token:
    """What a token is made of, and how fast it is."""

    hsms: int
    name: str
    model: HsmModel = field(compare=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--rate", type=float, action="append", metavar="N", help="handshakes/s; default: 10000, 100000, 1000000"
    )
    parser.add_argument(
        "--resumption", type=_share, action="append", metavar="SHARE", help="resumed of them; default: 0, 0.5, 0.9"
    )
    parser.add_argument("--key-type", type=KeyType, default=KeyType.ECDSA_P256, help="default: ecdsa-p256")
    parser.add_argument(
        "--slo-ms", type=float, default=25.0, help="99 %% of signatures are to take at most so long (default: 25)"
    )
    parser.add_argument(
        "--profile", choices=_PUBLISHED, default="cloudhsm-hsm2m.medium", help="published HSMs (default: %(default)s)"
    )
    own = parser.add_argument_group("an HSM of your own instead of a profile (measure it: pkcs11-tool, perf hsm)")
    own.add_argument("--hsm-rate", type=float, metavar="N", help="signatures/s of one HSM when saturated")
    own.add_argument("--hsm-units", type=int, default=1, metavar="N", help="signatures it makes at a time (default: 1)")
    parser.add_argument(
        "--round-trip-ms", type=float, default=1.0, help="to the HSM and back, beyond its own time (default: 1)"
    )
    parser.add_argument("--sessions", type=int, default=64, help="PKCS#11 sessions with each token (default: 64)")
    parser.add_argument(
        "--cpu-us-full", type=float, default=500.0, help="CPU of a full handshake, HSM worker included (default: 500)"
    )
    parser.add_argument("--cpu-us-resumed", type=float, default=220.0, help="CPU of a resumed one (default: 220)")
    parser.add_argument(
        "--utilisation", type=_share, default=0.7, help="how busy proxy cores may be (default: %(default)s)"
    )
    parser.add_argument("--hsm-price", type=float, metavar="PRICE", help="of one HSM for an hour")
    parser.add_argument("--core-price", type=float, default=0.0, metavar="PRICE", help="of one core for an hour")
    parser.add_argument("--validate", action="store_true", help="compare the simulation with a real run first")
    add_json_argument(parser)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def measure(arguments: argparse.Namespace) -> Iterator[Part]:
    """Simulate; yield the validation, if asked for, and the plan."""
    if arguments.validate:
        yield _validation_part()
    yield _plan(arguments)


def sustainable_rate(model: HsmModel, slo_s: float) -> float:
    """The highest rate of signatures each second at which a cell of such tokens keeps p99 within `slo_s`; 0 if none."""
    if model.round_trip_s + max(model.service_s) > slo_s:
        return 0.0
    low, high = 0.0, _TOKENS_PER_CELL * model.signatures_per_second
    for _ in range(_SEARCH_STEPS):
        rate = (low + high) / 2
        outcome = simulate(Scenario([model] * _TOKENS_PER_CELL, _PROXIES_PER_CELL, rate, _REQUESTS))
        if not outcome.failures and outcome.latencies.quantile_s(0.99) <= slo_s:
            low = rate
        else:
            high = rate
    return low


def _tokens(arguments: argparse.Namespace) -> list[Token]:
    """The kinds of token to choose from."""
    round_trip_s = arguments.round_trip_ms / 1e3
    if arguments.hsm_rate is not None:
        service_s = arguments.hsm_units / arguments.hsm_rate
        model = HsmModel(arguments.hsm_units, [service_s], round_trip_s, arguments.sessions)
        return [Token(1, "single", model)]
    if arguments.key_type not in _PUBLISHED[arguments.profile]:
        raise RuntimeError(f"no figures are published for {arguments.key_type.value}: give --hsm-rate")
    return [
        Token(hsms, f"clusters of {hsms}", HsmModel(hsms, [hsms / rate], round_trip_s, arguments.sessions))
        for hsms, rate in _PUBLISHED[arguments.profile][arguments.key_type].items()
    ]


def _plan(arguments: argparse.Namespace) -> Part:
    tokens = _tokens(arguments)
    sustained = {
        token.name: sustainable_rate(token.model, arguments.slo_ms / 1e3) / _TOKENS_PER_CELL for token in tokens
    }
    usable = [token for token in tokens if sustained[token.name]]
    if not usable:
        raise RuntimeError(f"no rate keeps p99 within {arguments.slo_ms:g} ms: the HSM alone takes longer")
    rows = []
    for rate in arguments.rate or (10_000.0, 100_000.0, 1_000_000.0):
        for resumed in arguments.resumption or (0.0, 0.5, 0.9):
            full = rate * (1 - resumed)
            hsms, token = min((_hsms(token, sustained[token.name], full), token) for token in usable)
            cores = _cores(full, rate - full, arguments)
            prices: tuple[str, ...] = ()
            if arguments.hsm_price is not None:
                hourly = hsms * arguments.hsm_price + cores * arguments.core_price
                prices = (f"{hourly:.2f}", f"{hourly / (rate * 3600 / 1e6):.4f}")
            rows.append((f"{rate:.0f}", f"{resumed:.0%}", f"{hsms} ({token.name})", f"{cores}", *prices))
    which = arguments.profile if arguments.hsm_rate is None else f"{arguments.hsm_rate:g} signatures/s each"
    each = ", ".join(f"{name}: {rate:.0f}" for name, rate in sustained.items())
    price_columns = () if arguments.hsm_price is None else ("price an hour", "price per million")
    return Part(
        f"Capacity, {arguments.key_type.value}: {which}",
        f"Cells of {_TOKENS_PER_CELL} tokens and {_PROXIES_PER_CELL} pools, and one token in ten to spare. p99 of "
        f"signatures within {arguments.slo_ms:g} ms, {arguments.round_trip_ms:g} ms to the HSM and back, which gives "
        f"these signatures/s: {each}. {arguments.cpu_us_full:g} us of CPU for a full handshake, "
        f"{arguments.cpu_us_resumed:g} for a resumed one, cores {arguments.utilisation:.0%} busy. "
        "Simulated: no such deployment was built.",
        Table(("handshakes/s", "resumed", "HSMs", "cores", *price_columns), rows),
        [],
        figures=sustained,
    )


def _hsms(token: Token, each: float, full: float) -> int:
    """How many HSMs make so many signatures a second, with one token in ten to spare."""
    tokens = max(_TOKENS_PER_CELL, math.ceil(full / each))
    return (tokens + math.ceil(tokens / 10)) * token.hsms


def _cores(full: float, resumed: float, arguments: argparse.Namespace) -> int:
    """How many cores so many full and resumed handshakes a second take."""
    busy: float = (full * arguments.cpu_us_full + resumed * arguments.cpu_us_resumed) / 1e6
    return math.ceil(busy / float(arguments.utilisation))


def _validation_part() -> Part:
    rows = []
    figures: dict[str, float] = {}
    for comparison in validate():
        for name, outcome in (("measured", comparison.measured), ("simulated", comparison.simulated)):
            rows.append(
                (
                    f"{comparison.rate:.0f}",
                    name,
                    f"{outcome.signed_share:.1%}",
                    quantiles_ms(outcome.latencies, 0.5, 0.9, 0.99),
                )
            )
            figures[f"p99 ms at {comparison.rate:.0f}, {name}"] = outcome.latencies.quantile_s(0.99) * 1e3
    return Part(
        "The simulation against a real run",
        f"{TOKENS} tokens of {SESSIONS} PKCS#11 sessions, {LATENCY_S * 1e3:g} ms in C_Sign, Poisson arrivals, "
        "deadline 2 s. Calibrated by single requests; the loads themselves are predictions.",
        Table(("asked each second", "", "signed in time", "p50 / p90 / p99 ms"), rows),
        [],
        figures=figures,
    )
