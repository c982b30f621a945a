"""What a user gets from pip, on every Python that is here: the sdist builds, installs alone and serves HTTPS."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import ssl
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT
from tests.proxy import free_port

_MINORS = ("3.10", "3.11", "3.12", "3.13")
_CAN_BUILD = """
import ensurepip, pathlib, sys, sysconfig, venv
print("%d.%d" % sys.version_info[:2])
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())
"""


def _pythons() -> dict[str, str]:
    """Return minor version -> interpreter, for each supported one that can make a venv and build extensions."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [sys.executable]
    for minor in _MINORS:
        candidates += map(str, sorted(pyenv.glob(f"versions/{minor}.*/bin/python{minor}")))
        candidates += [f"{directory}/python{minor}" for directory in os.get_exec_path()]
    found: dict[str, str] = {}
    for candidate in candidates:
        with contextlib.suppress(OSError):
            done = subprocess.run([candidate, "-c", _CAN_BUILD], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip() in _MINORS:
                found.setdefault(done.stdout.strip(), candidate)
    return found


_PYTHONS = _pythons()


@pytest.fixture(scope="module", params=sorted(_PYTHONS))
def wheel(request: pytest.FixtureRequest, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the sdist, by the build requirements it states."""
    directory = tmp_path_factory.mktemp("wheel")
    _run(_PYTHONS[request.param], "-m", "pip", "wheel", "--no-deps", "--wheel-dir", directory, sdist)
    (built,) = directory.glob("tlsproxy-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_directory(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a venv that has nothing else."""
    minor = re.search(r"-cp(\d)(\d+)-", wheel.name)
    assert minor is not None
    directory = tmp_path_factory.mktemp("venv")
    _run(_PYTHONS[f"{minor[1]}.{minor[2]}"], "-m", "venv", directory)
    _run(directory / "bin/python", "-m", "pip", "install", wheel)
    return directory / "bin"


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    """Run to the end and return stdout; what went wrong is in the AssertionError."""
    # The tree under test must not be what Python finds.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd or "/", env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_sdist_has_what_it_takes_to_build_test_and_operate(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        ".clang-format",
        ".dockerignore",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "configs/quickstart.yaml",
        "hsm/backends/pkcs11_functions.h",
        "tests/packaging/test_install.py",
        "tlsproxy/tls/_openssl.pyx",
        "tlsproxy/tls/_provider.c",
        "tlsproxy/tls/_provider.h",
    } <= names
    generated = {"tlsproxy/tls/_openssl.c", "hsm/backends/_cryptoki.c"}
    assert not [name for name in names if name in generated or name.endswith((".so", ".pyc", ".pem", ".pin", ".key"))]


def test_wheel_has_code_types_and_the_status_page_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.partition("/")[0] for name in names} == {"tlsproxy", "hsm"}
    page = {name for name in names if name.startswith("tlsproxy/serve/static/")}
    assert page == {f"tlsproxy/serve/static/{file.name}" for file in (ROOT / "tlsproxy/serve/static").iterdir()}
    assert {Path(name).suffix for name in set(names) - page} == {".py", ".pyi", ".so", ".typed"}


def test_installed_packages_fit_together(bin_directory: Path) -> None:
    _run(bin_directory / "python", "-m", "pip", "check")
    assert _run(bin_directory / "tlsproxy", "--version").startswith("tlsproxy ")


def test_installed_proxy_serves_https_and_checks_its_configuration(bin_directory: Path, tmp_path: Path) -> None:
    with _demo(bin_directory, tmp_path) as port:
        context = ssl.create_default_context(cafile=tmp_path / "demo/ca.pem")
        with contextlib.closing(http.client.HTTPSConnection("localhost", port, context=context, timeout=30)) as client:
            client.request("GET", "/")
            response = client.getresponse()
            assert (response.status, bool(response.read())) == (200, True)
    assert "sound" in _run(bin_directory / "tlsproxy", "check", tmp_path / "demo/config.yaml")


@contextlib.contextmanager
def _demo(bin_directory: Path, directory: Path) -> Iterator[int]:
    """Run the installed demo while the context lasts; give its HTTPS port once it serves."""
    port, admin_port = free_port(), free_port()
    options = ["--dir", directory / "demo", "--port", port, "--admin-port", admin_port, "--workers", 1]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [bin_directory / "tlsproxy", "demo", *map(str, options)], cwd=directory, stdout=log, stderr=log
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (directory / "log").read_text()
            if _is_ready(admin_port):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, (directory / "log").read_text()


def _is_ready(admin_port: int) -> bool:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", admin_port, timeout=30)) as admin:
        try:
            admin.request("GET", "/readyz")
            return admin.getresponse().status == 200
        except OSError:
            return False
