"""Whether the simulation tells the truth: the same tokens and arrivals, once for real on this machine, once simulated.

The tokens are SoftHSM2 behind tests/fault_module, which sleeps in C_Sign. How long their signatures really take, and
what the way to a worker and back costs, is measured first with one request at a time; from then on the simulation is on
its own. The arrivals are the same in both.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from hsm.launcher import Pkcs11Token, open_pool
from hsm.messages import SignatureScheme
from hsm.pool import Signature, SignerPool, SigningKey
from perf.simulation import WARM_UP_S, HsmModel, Outcome, Scenario, arrivals, simulate
from perf.turns import Progress
from tests.softhsm import FaultyToken
from tests.tokens import CERTIFICATE_VERIFY

TOKENS, SESSIONS, LATENCY_S = 2, 4, 0.010
LOADS = (0.5, 0.8, 0.9, 1.5)
"""Of what the tokens can do at most."""
_SCHEME = SignatureScheme.ECDSA_SECP256R1_SHA256
_CALIBRATION_REQUESTS = 200
_MEASURED_S = 6.0
_DEADLINE_S = 2.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load, for real and simulated."""

    rate: float
    measured: Outcome
    simulated: Outcome


def validate() -> list[Comparison]:
    """Measure and simulate every load."""
    with tempfile.TemporaryDirectory(prefix="perf-validation-") as name:
        tokens = []
        for number in range(TOKENS):
            token = FaultyToken(Path(name), name=f"hsm-{number}")
            token.faults.set_sign_latency(LATENCY_S)
            tokens.append(token.launchable(sessions=SESSIONS))
        return uvloop.run(_validate(tokens))


async def _validate(tokens: Sequence[Pkcs11Token]) -> list[Comparison]:
    progress = Progress("validation", 1 + len(LOADS))
    async with open_pool(tokens, log_level="warning", sign_deadline_s=_DEADLINE_S, max_pending=1 << 20) as pool:
        key = pool.key("www")
        progress.show("one request at a time")
        model = await _calibrate(pool, key)
        measured: list[tuple[float, Outcome]] = []
        for load in LOADS:
            progress.step()
            progress.show(f"{load:.0%} load")
            rate = load * TOKENS * model.signatures_per_second
            measured.append((rate, await _measure(pool, key, rate)))
    progress.clear()
    loop = asyncio.get_running_loop()
    return [
        Comparison(rate, outcome, await loop.run_in_executor(None, simulate, _scenario(model, rate)))
        for rate, outcome in measured
    ]


def _scenario(model: HsmModel, rate: float) -> Scenario:
    return Scenario([model] * TOKENS, 1, rate, int(rate * _MEASURED_S), _DEADLINE_S)


async def _calibrate(pool: SignerPool, key: SigningKey) -> HsmModel:
    service_s, way_s = [], []
    for _ in range(_CALIBRATION_REQUESTS):
        signature = await pool.submit(key, _SCHEME, CERTIFICATE_VERIFY)
        service_s.append(signature.sign_s)
        way_s.append(signature.queue_s)
    return HsmModel(SESSIONS, service_s, statistics.median(way_s), SESSIONS)


async def _measure(pool: SignerPool, key: SigningKey, rate: float) -> Outcome:
    """Ask at Poisson intervals for some seconds, after a warm-up, then wait for what is pending."""
    outcome = Outcome()
    interval_s = arrivals(rate, seed=1)
    begin_s = time.monotonic() + WARM_UP_S
    end_s = begin_s + _MEASURED_S
    due_s = begin_s - WARM_UP_S

    def ask() -> None:
        asked_s = time.monotonic()

        def note(future: asyncio.Future[Signature]) -> None:
            error = future.exception()
            if asked_s < begin_s:
                return
            if error is None:
                outcome.latencies.record(time.monotonic() - asked_s)
            else:
                outcome.failures[type(error).__name__] += 1

        pool.submit(key, _SCHEME, CERTIFICATE_VERIFY).add_done_callback(note)

    while due_s < end_s:
        await asyncio.sleep(due_s - time.monotonic())
        while due_s <= time.monotonic():
            ask()
            due_s += next(interval_s)
    # Nothing outlives its deadline.
    await asyncio.sleep(_DEADLINE_S + 0.1)
    return outcome
