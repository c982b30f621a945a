"""The command line: `tlsproxy run | check | demo | status | reload | drain`.

Exit codes: 0 fine, 1 it could not run, 2 bad usage or configuration. Every error is one line on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import uvloop

import tlsproxy
from hsm import logs
from hsm.errors import HsmError
from hsm.messages import KeyType
from tlsproxy import demo, top
from tlsproxy.config_yaml import load_config, load_runtime_dir
from tlsproxy.errors import ConfigError, StartupError
from tlsproxy.serve.command_socket import send_command
from tlsproxy.serve.materials import check_materials, load_materials
from tlsproxy.serve.runtime_directory import COMMAND_SOCKET
from tlsproxy.serve.service_manager import passed_sockets
from tlsproxy.serve.sockets import expect_wanted
from tlsproxy.serve.status import render_status
from tlsproxy.serve.supervisor import Supervisor
from tlsproxy.serve.takeover import Predecessor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments` (default: the process's) and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (StartupError, HsmError) as error:
        print(f"tlsproxy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tlsproxy: interrupted before it was ready", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"tlsproxy: {error.filename or 'system'}: {error.strerror}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tlsproxy", description="A reverse proxy that ends TLS without ever holding a private key."
    )
    parser.add_argument("--version", action="version", version=f"tlsproxy {tlsproxy.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="run the proxy until SIGTERM or SIGINT")
    run.add_argument("--config", required=True, metavar="FILE", help="the configuration, YAML")
    run.add_argument(
        "--take-over",
        action="store_true",
        help="take the listening sockets of the instance that runs, and its place once this one serves",
    )
    run.set_defaults(command=_run)

    check = commands.add_parser("check", help="find every problem of a configuration and the files it names")
    check.add_argument("config", metavar="FILE", help="the configuration, YAML")
    check.set_defaults(command=_check)

    status = commands.add_parser("status", help="show what the running proxy serves and how")
    _add_target(status)
    status.add_argument("--json", action="store_true", help="as one JSON document")
    status.set_defaults(command=_operate, operation="status")

    for name, what in (("reload", "load its configuration anew"), ("drain", "let its connections finish and end")):
        command = commands.add_parser(name, help=f"tell the running proxy to {what}")
        _add_target(command)
        command.set_defaults(command=_operate, operation=name)

    live = commands.add_parser("top", help="show what the running proxy does, live, from its admin port")
    live.add_argument(
        "--admin",
        type=_upstream,
        default="http://127.0.0.1:9900",
        metavar="URL",
        help="its admin port (default: %(default)s)",
    )
    live.add_argument("--once", action="store_true", help="print it once, anywhere")
    live.set_defaults(command=_top)

    show = commands.add_parser("demo", help="run a complete demo on this machine until Ctrl-C")
    show.add_argument("--dir", type=Path, default=Path(".demo"), help="where its state lives (default: %(default)s)")
    show.add_argument("--port", type=_port, default=8443, help="HTTPS, on 127.0.0.1 (default: %(default)s)")
    show.add_argument("--admin-port", type=_port, default=9900, help="metrics and status (default: %(default)s)")
    show.add_argument(
        "--key-type",
        choices=[kind.value for kind in demo.KEY_TYPES],
        default=KeyType.ECDSA_P256.value,
        help="of the certificate's key (default: %(default)s)",
    )
    show.add_argument("--workers", type=_workers, default=0, help="proxy processes (default: one per core)")
    show.add_argument("--upstream", type=_upstream, metavar="URL", help="a back end instead of the sample one")
    show.set_defaults(command=_demo)
    return parser


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    materials = load_materials(config)
    logs.configure(config.log.level.value, config.log.format.value, "supervisor")
    inherited = passed_sockets()
    expect_wanted(inherited, config)
    predecessor = Predecessor(config.runtime_dir / COMMAND_SOCKET) if options.take_over else None
    uvloop.run(Supervisor(options.config, config, materials, inherited=inherited, predecessor=predecessor).run())
    return 0


def _add_target(parser: argparse.ArgumentParser) -> None:
    """Which running proxy: one that another configuration file may be broken for by now."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--config", metavar="FILE", help="the configuration it was started with")
    target.add_argument("--runtime-dir", type=Path, metavar="DIR", help="its runtime_dir, as the configuration says")


def _operate(options: argparse.Namespace) -> int:
    directory = options.runtime_dir or load_runtime_dir(options.config)
    answer = send_command(directory / COMMAND_SOCKET, options.operation)
    for error in answer.get("errors", ()):
        print(error, file=sys.stderr)
    if "status" in answer:
        print(json.dumps(answer["status"]) if options.json else render_status(answer["status"]))
    return int(answer.get("exit_code", 0))


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    check_materials(config, load_materials(config))
    print(f"{options.config}: sound")
    return 0


def _demo(options: argparse.Namespace) -> int:
    settings = demo.DemoSettings(
        directory=options.dir,
        port=options.port,
        admin_port=options.admin_port,
        key_type=KeyType(options.key_type),
        workers=options.workers,
        upstream=options.upstream,
    )
    asyncio.run(demo.run(settings))
    return 0


def _top(options: argparse.Namespace) -> int:
    host, _, port = options.admin.rpartition(":")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(top.run(host.strip("[]"), int(port), once=options.once))
    return 0


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535; got {text!r}")
    return int(text)


def _workers(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 1024; got {text!r}")
    return int(text)


def _upstream(text: str) -> str:
    """Return `host:port` of an http URL."""
    problem = argparse.ArgumentTypeError(f"expected a URL such as http://127.0.0.1:8000; got {text!r}")
    try:
        url = urlsplit(text)
        port = url.port or 80
    except ValueError:
        raise problem from None
    if url.scheme != "http" or not url.hostname or url.path not in ("", "/") or url.query or url.username:
        raise problem
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    return f"{host}:{port}"
