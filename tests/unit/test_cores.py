"""Cores by the quota of control groups, in trees as kernels and container runtimes lay them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tlsproxy.cores import usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def machine(tmp_path: Path, cgroup: str, mounts: list[str], files: dict[str, str]) -> Path:
    """Lay out /proc/self and the control groups; `{}` in a mount stands for the directory that `files` are in."""
    process, tree = tmp_path / "proc", tmp_path / "fs"
    process.mkdir()
    (process / "cgroup").write_text(cgroup)
    lines = ["25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw", *(mount.format(tree) for mount in mounts)]
    (process / "mountinfo").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"{content}\n")
    return process


V2 = ["31 25 0:28 / {} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"]
V1 = [
    "31 25 0:27 / {} ro - tmpfs tmpfs ro,mode=755",
    "32 31 0:28 / {}/memory rw - cgroup cgroup rw,memory",
    "33 31 0:29 / {}/cpu rw shared:5 - cgroup cgroup rw,cpu,cpuacct",
]
V1_GROUPS = "7:memory:/m\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/s\n0::/system.slice\n"


@pytest.mark.parametrize(
    ("content", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8)]
)
def test_a_quota_of_version_2_is_rounded_up(tmp_path: Path, content: str, cores: int) -> None:
    process = machine(tmp_path, "0::/a/b\n", V2, {"a/b/cpu.max": content, "cgroup.procs": ""})
    assert usable_cores(process) == cores


def test_the_least_quota_of_a_group_and_those_above_it_counts(tmp_path: Path) -> None:
    files = {"a/b/c/cpu.max": "500000 100000", "a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}
    assert usable_cores(machine(tmp_path, "0::/a/b/c\n", V2, files)) == 3


def test_in_a_container_the_mount_is_the_group_itself(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", V2, {"cpu.max": "200000 100000"})) == 2


def test_a_larger_quota_than_there_are_cores_changes_nothing(tmp_path: Path) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", V2, {"cpu.max": "6400000 100000"})) == 8


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("250000", 3)])
def test_version_1_has_quota_and_period_in_two_files(tmp_path: Path, quota: str, cores: int) -> None:
    files = {"cpu/docker/abc/cpu.cfs_quota_us": quota, "cpu/docker/abc/cpu.cfs_period_us": "100000"}
    files |= {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    assert usable_cores(machine(tmp_path, V1_GROUPS, V1, files)) == cores


def test_a_mount_may_begin_at_the_group(tmp_path: Path) -> None:
    mounts = ["33 31 0:29 /docker/abc {} ro - cgroup cgroup rw,cpu,cpuacct"]
    files = {"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}
    assert usable_cores(machine(tmp_path, V1_GROUPS, mounts, files)) == 2


def test_a_group_that_has_another_name_here_is_the_mount(tmp_path: Path) -> None:
    mounts = ["33 31 0:29 /../.. {} ro - cgroup2 cgroup rw"]
    assert usable_cores(machine(tmp_path, "0::/../pod\n", mounts, {"cpu.max": "200000 100000"})) == 2


def test_a_mount_point_may_have_spaces(tmp_path: Path) -> None:
    spaced = tmp_path / "a b"
    spaced.mkdir()
    mounts = ["31 25 0:28 / {} rw - cgroup2 cgroup2 rw".format(str(spaced).replace(" ", "\\040"))]
    (spaced / "cpu.max").write_text("200000 100000\n")
    assert usable_cores(machine(tmp_path, "0::/\n", mounts, {})) == 2


@pytest.mark.parametrize("content", ["", "nonsense", "200000 0", "200000 x", "1 2 3"])
def test_what_is_not_a_quota_limits_nothing(tmp_path: Path, content: str) -> None:
    assert usable_cores(machine(tmp_path, "0::/\n", V2, {"cpu.max": content})) == 8


def test_without_control_groups_all_cores_count(tmp_path: Path) -> None:
    assert usable_cores(tmp_path / "missing") == 8
    assert usable_cores(machine(tmp_path, "\n0:\n", V2, {})) == 8
