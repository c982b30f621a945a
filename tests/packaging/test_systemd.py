"""The units: sound to systemd, as closed as they claim, and in agreement with the configuration beside them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT
from tlsproxy.config_yaml import load_config

DIRECTORY = ROOT / "configs/systemd"
UNITS = ("tlsproxy.service", "tlsproxy.socket")
MAX_EXPOSURE = 2.6
"""Of 10, by `systemd-analyze security`; docs/install.md says the same."""
CONFIG = load_config(str(DIRECTORY / "config.yaml"))


class _Unit(configparser.RawConfigParser):
    """A unit file, names as they are written; of a setting that is given twice the last counts."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, comment_prefixes=("#",), delimiters=("=",), interpolation=None)
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read_string((DIRECTORY / name).read_text())


SERVICE = _Unit("tlsproxy.service")["Service"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory with systemd's own units, ours, and a program where ours expects it."""
    shutil.copytree("/usr/lib/systemd/system", tmp_path / "usr/lib/systemd/system", symlinks=True)
    ours = tmp_path / "etc/systemd/system"
    ours.mkdir(parents=True)
    for unit in UNITS:
        shutil.copy(DIRECTORY / unit, ours)
    program = tmp_path / SERVICE["ExecStart"].split()[0].lstrip("/")
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return tmp_path


def _analyze(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        ["systemd-analyze", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def test_systemd_finds_nothing_wrong_with_the_units(root: Path) -> None:
    assert _analyze("verify", f"--root={root}", "--man=no", *UNITS) == (0, "")


def test_systemd_would_find_something_wrong(root: Path) -> None:
    service = root / "etc/systemd/system/tlsproxy.service"
    service.write_text(service.read_text().replace("WatchdogSec=", "WatchDogSec="))
    assert "WatchDogSec" in _analyze("verify", f"--root={root}", "--man=no", *UNITS)[1]


def test_the_service_is_as_closed_as_the_documents_say(root: Path) -> None:
    _, report = _analyze("security", "--offline=true", f"--root={root}", "tlsproxy.service")
    exposure = re.search(r"Overall exposure level for tlsproxy.service: ([\d.]+)", report)
    assert exposure is not None, report
    assert float(exposure[1]) <= MAX_EXPOSURE
    assert f"says {MAX_EXPOSURE} of 10" in (ROOT / "docs/install.md").read_text()


def test_systemd_listens_where_the_configuration_does() -> None:
    text = (DIRECTORY / "tlsproxy.socket").read_text()
    assert set(re.findall(r"^ListenStream=(.+)$", text, re.MULTILINE)) == {str(x.address) for x in CONFIG.listeners}


def test_the_runtime_directory_is_the_one_systemd_makes() -> None:
    assert str(CONFIG.runtime_dir) == f"/run/{SERVICE['RuntimeDirectory']}"
    assert SERVICE["RuntimeDirectoryMode"] == "0700"


def test_connections_have_time_to_finish() -> None:
    assert float(SERVICE["TimeoutStopSec"].removesuffix("s")) > CONFIG.drain_timeout_s
    assert SERVICE["KillMode"] == "mixed", "the supervisor tells the workers"


def test_the_users_that_workers_run_as_are_made() -> None:
    made = re.findall(r"^u (\S+) -", (DIRECTORY / "tlsproxy.sysusers").read_text(), re.MULTILINE)
    assert [CONFIG.user, CONFIG.hsm_user] == made
    done = subprocess.run(
        ["systemd-sysusers", "--dry-run", DIRECTORY / "tlsproxy.sysusers"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
