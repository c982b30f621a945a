"""The command line as scripts see it: exit codes, one clear line, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

import tlsproxy
from hsm.messages import KeyType
from tests.proxy import make_site, run_to_end, site_config, write_config

KEYS = {"www": KeyType.ECDSA_P256}


async def test_check_says_nothing_bad_of_a_sound_configuration(tmp_path: Path) -> None:
    make_site(tmp_path, KEYS)
    file = write_config(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9"))
    assert await run_to_end("check", str(file)) == (0, f"{file}: sound\n", "")


async def test_check_finds_every_mistake_in_the_file_at_once(tmp_path: Path) -> None:
    config = site_config(tmp_path, KEYS, "nonsense", workers="many", surprise=1)
    file = write_config(tmp_path, config)
    code, stdout, stderr = await run_to_end("check", str(file))
    assert (code, stdout) == (2, "")
    assert [line.split(": ")[1] for line in stderr.splitlines()] == [
        "workers",
        "upstreams[0].servers[0].address",
        "surprise",
    ]
    assert all(line.startswith(f"{file}:") for line in stderr.splitlines())


async def test_check_finds_every_mistake_in_the_files_it_names_at_once(tmp_path: Path) -> None:
    keys = KEYS | {"web": KeyType.ECDSA_P256}
    token = make_site(tmp_path, keys)
    config = site_config(tmp_path, keys, "127.0.0.1:9")
    (tmp_path / "web.pem").write_bytes((tmp_path / "www.pem").read_bytes())
    token.pin_file.unlink()
    file = write_config(tmp_path, config)
    code, _, stderr = await run_to_end("check", str(file))
    places = [line.split(": ")[1] for line in stderr.splitlines()]
    assert (code, places) == (2, ["hsm.tokens[0].pin_file", "certificates[1].key"])
    assert "token.pin" not in stderr.splitlines()[0], "what stands at pin_file may be a PIN by mistake"


async def test_check_reads_the_soft_token_without_its_pin(tmp_path: Path) -> None:
    token = make_site(tmp_path, KEYS)
    file = write_config(tmp_path, site_config(tmp_path, KEYS, "127.0.0.1:9"))
    token.path.write_text("{}")
    code, _, stderr = await run_to_end("check", str(file))
    assert code == 2
    assert ": hsm.tokens[0].path: " in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("fly",), "fly"),
        (("run",), "--config"),
        (("check",), "FILE"),
        (("demo", "--port", "0"), "expected a port from 1 to 65535; got '0'"),
        (("demo", "--workers", "x"), "expected a number from 1 to 1024; got 'x'"),
        (("demo", "--key-type", "dsa"), "'ecdsa-p256', 'rsa-2048'"),
        (("demo", "--upstream", "https://x"), "expected a URL such as http://127.0.0.1:8000; got 'https://x'"),
    ],
)
async def test_bad_usage_is_exit_2(arguments: tuple[str, ...], words: str) -> None:
    code, stdout, stderr = await run_to_end(*arguments)
    assert (code, stdout) == (2, "")
    assert words in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("command", ["check", "run --config"])
async def test_a_missing_file_is_one_line_and_exit_2(command: str) -> None:
    code, _, stderr = await run_to_end(*command.split(), "/nowhere/proxy.yaml")
    assert code == 2
    assert stderr == ("/nowhere/proxy.yaml:1:1: (file): expected a readable file; got No such file or directory\n")


async def test_the_version() -> None:
    assert await run_to_end("--version") == (0, f"tlsproxy {tlsproxy.__version__}\n", "")
