"""The whole comparison: every measurement with the settings of PERFORMANCE.md, as one report.

Writes report.html (self-contained), report.md and data.json (every turn, with latency histograms) into a directory, and
the figures into PERFORMANCE.md, between its two markers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from perf import bulk, capacity, handshakes, idle, requests, storm
from perf.machine import command
from perf.parts import Part
from perf.report import Report, Run, update_marked
from perf.targets import judge, targets_table

_HSM_SERVERS = "--server nginx-pkcs11 --server tlsproxy-pkcs11 --server stunnel-pkcs11"
_KEY_FILE_SERVERS = "--server nginx --server tlsproxy --server haproxy --server hitch --server stunnel"
_PYTHON_SERVERS = "--server nginx --server tlsproxy --server mitmdump --server hypercorn-httpx"
_LATENCIES = "--latency-ms 0 --latency-ms 1 --latency-ms 5 --latency-ms 20"

RUNS: dict[str, tuple[ModuleType, str]] = {
    "key in memory": (handshakes, f"{_KEY_FILE_SERVERS} --turns 5 --seconds 1"),
    "key in SoftHSM2": (handshakes, f"{_HSM_SERVERS} --turns 5 --seconds 1"),
    # So many in flight that the rate at 20 ms is not bounded by their number.
    "HSM latency": (
        handshakes,
        f"{_HSM_SERVERS} --key-type ecdsa-p256 {_LATENCIES} --concurrency 192 --turns 3 --seconds 1.5",
    ),
    "storm": (storm, f"{_HSM_SERVERS} --rate 700 --turns 3 --seconds 3"),
    "resumed": (handshakes, "--key-type ecdsa-p256 --resumed --turns 3 --seconds 1"),
    "requests": (requests, "--turns 5 --seconds 1"),
    "requests in HTTP/2": (
        requests,
        "--http2 10 --server nginx --server tlsproxy --server haproxy --turns 3 --seconds 1",
    ),
    "Python peers": (requests, f"{_PYTHON_SERVERS} --turns 2 --seconds 1"),
    "bulk": (bulk, "--turns 3 --seconds 1"),
    "Python peers, bulk": (bulk, f"{_PYTHON_SERVERS} --turns 2 --seconds 1"),
    "bulk uploads": (bulk, f"--upload {_PYTHON_SERVERS} --server haproxy --turns 3 --seconds 1"),
    "idle": (idle, "--server nginx --server tlsproxy"),
    "capacity": (capacity, "--validate"),
}
"""What is measured, each as its subcommand takes it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's options."""
    parser.add_argument(
        "--only", action="append", choices=RUNS, metavar="RUN", help=f"leave out all but these of {', '.join(RUNS)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one turn of half a second of everything: to see that it works"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/perf-report"), help="directory to write to (default: %(default)s)"
    )
    parser.add_argument("--update", type=Path, metavar="FILE", help="put the figures between the markers in this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write it all. After Ctrl-C, what there is; what fails is left out, and said."""
    report = Report(command())
    interrupted = False
    for name in arguments.only or RUNS:
        module, options = RUNS[name]
        words = shlex.split(options)
        if arguments.quick and module in (handshakes, storm, requests, bulk):
            words += ["--turns", "1", "--seconds", "0.5"]
        run = Run(f"python -m perf {module.__name__.removeprefix('perf.')} {shlex.join(words)}".rstrip())
        report.runs[name] = run
        try:
            for part in _measure(module, words):
                print(part.markdown(), flush=True)
                run.parts.append(part)
        except RuntimeError as error:
            run.error = str(error)
            print(f"{run.command} failed: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
        if interrupted or any(part.interrupted for part in run.parts):
            interrupted = True
            break
    report.targets = judge({name: run.parts for name, run in report.runs.items()})
    print(targets_table(report.targets).markdown())
    report.write(arguments.output)
    print(f"written to {arguments.output}: report.html, report.md, data.json")
    if interrupted:
        return 130
    if arguments.update:
        update_marked(arguments.update, report.markdown())
    return 1 if any(run.error for run in report.runs.values()) else 0


def _measure(module: ModuleType, words: list[str]) -> Iterator[Part]:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    measure: Callable[[argparse.Namespace], Iterator[Part]] = module.measure
    return measure(parser.parse_args(words))
