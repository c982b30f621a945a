"""`python -m perf SUBCOMMAND`: see perf/README.md for the method and its limits."""

from __future__ import annotations

import argparse
import sys

from perf import bulk, cluster, handshakes, hsm, pool, requests, storm


def main() -> int:
    """Parse the command line and run one measurement."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    subcommands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    modules = {
        "handshakes": handshakes,
        "requests": requests,
        "bulk": bulk,
        "storm": storm,
        "pool": pool,
        "hsm": hsm,
        "cluster": cluster,
    }
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        subparser = subcommands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    arguments = parser.parse_args()
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
