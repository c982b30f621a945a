"""The hsm_* metrics. Each family is counted on one side only, so that the sum over all processes is right.

The pool, in each proxy process, counts what a handshake sees: requests, waits, failovers, the state of tokens as seen
from there. The worker counts what the token does: sessions, its own error codes, and what its policy refused (a proxy
that was taken over could hide that).

Where the values of a label are known, their counters are there before the first event: Prometheus' rate() and
increase() do not see the step from nothing to one.
"""

from __future__ import annotations

from hsm.metricstore import Family, Kind, Merge

_SIGN_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)

# Counted by the pool.
SIGN_REQUESTS = Family(
    "hsm_sign_requests_total",
    Kind.COUNTER,
    "Signatures asked for, by the token that gave the last answer ('' if none did) and the outcome.",
    ("token", "scheme", "result"),
    max_label_sets=1024,
)
SIGN_DURATION = Family(
    "hsm_sign_duration_seconds",
    Kind.HISTOGRAM,
    "Time the token took to make a signature, as its worker measured it.",
    ("token", "scheme"),
    _SIGN_BUCKETS,
)
QUEUE_DURATION = Family(
    "hsm_queue_duration_seconds",
    Kind.HISTOGRAM,
    "Time a signature that was made had waited, in the proxy and in the worker, before the token began.",
    ("token",),
    _SIGN_BUCKETS,
)
PENDING = Family(
    "hsm_pending",
    Kind.GAUGE,
    "Requests sent to a token's workers and not yet answered; '' are those not yet sent.",
    ("token",),
)
SHED = Family("hsm_shed_total", Kind.COUNTER, "Requests refused at once, before any token saw them.", ("reason",))
RETRIES = Family(
    "hsm_retries_total",
    Kind.COUNTER,
    "Requests sent again after a worker died, a token failed, or an answer was long overdue.",
)
FAILOVERS = Family("hsm_failovers_total", Kind.COUNTER, "Requests that were sent again to another token than before.")
SHED_REASONS = ("queue_full", "overloaded", "no_key", "unavailable")
HEDGES = Family(
    "hsm_hedges_total",
    Kind.COUNTER,
    "Requests sent to a second token because the first was slow: which of the two answered first, or no budget.",
    ("outcome",),
)
HEDGE_OUTCOMES = ("won", "lost", "no_budget")
TOKEN_UP = Family(
    "hsm_token_up",
    Kind.GAUGE,
    "1 if every proxy process reaches a worker of the token and its circuit is closed.",
    ("token",),
    merge=Merge.MIN,
)
CIRCUIT_STATE = Family(
    "hsm_circuit_state",
    Kind.GAUGE,
    "Proxy processes whose circuit breaker for the token is in the state.",
    ("token", "state"),
)
KEY_MISMATCHES = Family(
    "hsm_key_mismatches_total",
    Kind.COUNTER,
    "Connections to a worker whose key under a certificate's label is not that certificate's key.",
    ("token",),
)

# Counted by the worker.
POLICY_REJECTED = Family(
    "hsm_policy_rejected_total",
    Kind.COUNTER,
    "Requests the key's policy refused to sign, by the rule broken.",
    ("rule",),
)
SESSIONS = Family("hsm_sessions", Kind.GAUGE, "PKCS#11 sessions of the token's worker.", ("token", "state"))
SESSION_REOPENS = Family(
    "hsm_session_reopens_total",
    Kind.COUNTER,
    "PKCS#11 sessions opened again after the token had lost them.",
    ("token",),
)
ERRORS = Family("hsm_errors_total", Kind.COUNTER, "Errors the token answered with, by its own code.", ("token", "code"))

FAMILIES = {
    family.name: family
    for family in (
        SIGN_REQUESTS,
        SIGN_DURATION,
        QUEUE_DURATION,
        PENDING,
        SHED,
        RETRIES,
        FAILOVERS,
        HEDGES,
        TOKEN_UP,
        CIRCUIT_STATE,
        KEY_MISMATCHES,
        POLICY_REJECTED,
        SESSIONS,
        SESSION_REOPENS,
        ERRORS,
    )
}
"""All of them by name, as `metricstore.read_samples` wants them."""
