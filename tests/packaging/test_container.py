"""The Containerfile, as far as it can be judged without a registry to pull a base image from."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.packaging.conftest import ROOT

CONTAINERFILE = ROOT / "configs/container/Containerfile"
TEXT = CONTAINERFILE.read_text()
ALLOWED = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, CONTAINERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_context_has_what_the_build_reads(tmp_path: Path) -> None:
    for name in ALLOWED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "out").mkdir()
    prepare = "import sys, setuptools.build_meta as b; print(b.prepare_metadata_for_build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", prepare, tmp_path / "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (metadata,) = (tmp_path / "out").glob("*.dist-info")
    assert (metadata / "licenses/LICENSE").exists()
    assert "# tlsproxy" in (metadata / "METADATA").read_text()
    assert {"hsm", "tlsproxy"} < set(ALLOWED)


def test_the_context_has_no_place_for_secrets() -> None:
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    assert set(ALLOWED) == {"LICENSE", "README.md", "pyproject.toml", "hsm", "tlsproxy"}


def test_no_stage_that_is_shipped_runs_as_root_or_has_a_compiler() -> None:
    stages = re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]
    build, *shipped = stages
    assert "gcc" in build
    for stage in shipped:
        assert "gcc" not in stage
        users = re.findall(r"^USER (.+)$", stage, re.MULTILINE)
        assert users[-1:] in ([], ["65532:65532"]), "the last word is an unprivileged user's"
    assert re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE)[-1] == "proxy"
