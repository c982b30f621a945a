"""`python -m perf SUBCOMMAND`: see perf/README.md for the method and its limits."""

from __future__ import annotations

import argparse
import resource
import sys

from perf import bulk, capacity, cluster, compare, handshakes, hsm, idle, pool, requests, storm
from perf.parts import run_parts

_MEASUREMENTS = {
    "handshakes": handshakes,
    "requests": requests,
    "bulk": bulk,
    "storm": storm,
    "idle": idle,
    "capacity": capacity,
}
_OTHERS = {"compare": compare, "pool": pool, "hsm": hsm, "cluster": cluster}


def main() -> int:
    """Parse the command line and run one measurement."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, module in (_MEASUREMENTS | _OTHERS).items():
        summary = (module.__doc__ or "").partition("\n")[0]
        subparser = subcommands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        if name in _MEASUREMENTS:
            subparser.set_defaults(run=run_parts, measure=_MEASUREMENTS[name].measure)
        else:
            subparser.set_defaults(run=_OTHERS[name].run)
    arguments = parser.parse_args()
    # Ten thousand connections need as many descriptors, here and in the servers, which inherit the limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return int(arguments.run(arguments))
    except RuntimeError as error:
        print(f"perf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Before the first turn, or after the last: there is nothing to report.
        return 130


if __name__ == "__main__":
    sys.exit(main())
