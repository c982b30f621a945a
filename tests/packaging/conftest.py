"""The project as it is released: its sdist, made once from a copy, so that no test writes into the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".demo", ".*_cache", "__pycache__", "build", "dist")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist as `python -m build --sdist` would; return the archive."""
    directory = tmp_path_factory.mktemp("sdist")
    source = shutil.copytree(ROOT, directory / "source", ignore=_NOT_COPIED)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(directory)], cwd=source, check=True, capture_output=True)
    (archive,) = directory.glob("tlsproxy-*.tar.gz")
    return archive
