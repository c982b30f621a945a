"""The example configurations are sound, and say the truth about defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config.test_config_yaml import MINIMAL, parse
from tlsproxy.config_yaml import load_config

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_an_example_is_sound(file: Path) -> None:
    assert load_config(str(file)).listeners


def test_what_the_quickstart_calls_a_default_is_one() -> None:
    shown = load_config(str(CONFIGS / "quickstart.yaml"))
    default = parse(MINIMAL)
    for name in ("workers", "drain_timeout_s", "log"):
        assert getattr(shown, name) == getattr(default, name)
    assert shown.runtime_dir.name == default.runtime_dir.name
    for name in ("sign_deadline_s", "max_pending"):
        assert getattr(shown.hsm, name) == getattr(default.hsm, name)
    for name in ("mode", "profile", "timeouts", "limits", "upstream"):
        assert getattr(shown.listeners[0], name) == getattr(default.listeners[0], name)
    for name in ("host", "path"):
        assert getattr(shown.listeners[0].routes[0], name) == getattr(default.listeners[0].routes[0], name)
    for name in ("balance", "keepalive", "timeouts"):
        assert getattr(shown.upstreams[0], name) == getattr(default.upstreams[0], name)
