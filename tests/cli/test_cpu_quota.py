"""The CPU quota of this process, read from trees of control groups as kernels and containers show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sllm.cli.checks.cpu_quota import cpu_quota

if TYPE_CHECKING:
    from pathlib import Path

V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "33 31 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
UNIFIED = "34 31 0:31 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A made-up root folder: what /proc/self says, and files under /sys/fs/cgroup."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups, encoding="utf-8")
    (proc / "mountinfo").write_text(f"23 1 0:20 / / rw - overlay overlay rw\n{mounts}\n", encoding="utf-8")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "50000 100000"}, 0.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2.0),
        ({"a/b/cpu.max": "100000 100000", "a/cpu.max": "200000 100000"}, 1.0),
        ({"a/b/c/cpu.max": "100000 100000", "other/cpu.max": "1000 100000"}, None),  # not groups of ours
        ({"a/b/cpu.max": "nonsense"}, None),
    ],
)
def test_version_2(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    """The smallest quota of the group and of all that it is in."""
    assert cpu_quota(machine(tmp_path, "0::/a/b\n", V2, files)) == cores


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1", "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000"}, None),
        ({"cpu,cpuacct/a/b/cpu.cfs_quota_us": "25000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "50000"}, 0.5),
        (
            {
                "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        ({"cpu,cpuacct/a/b/cpu.cfs_quota_us": "25000", "cpu,cpuacct/a/b/cpu.cfs_period_us": "0"}, None),
    ],
)
def test_version_1(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    groups = "5:memory:/elsewhere\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a\n"
    assert cpu_quota(machine(tmp_path, groups, f"{V1}\n{MEMORY}", files)) == cores


def test_both_versions(tmp_path: Path) -> None:
    """As systemd mounts them in its hybrid layout: the controller for CPU time is version 1's."""
    files = {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"}
    groups = "4:cpu,cpuacct:/a\n0::/a\n"
    assert cpu_quota(machine(tmp_path, groups, f"{V1}\n{UNIFIED}", files)) == 1.0


@pytest.mark.parametrize("group", ["/docker/abc", "/", "/../other", "/kubepods/pod"])
def test_a_container_sees_its_own_part_of_the_tree(tmp_path: Path, group: str) -> None:
    """What is mounted is the group of the container, whatever name the host has for it."""
    mounts = V2.replace(" / /sys", " /docker/abc /sys")
    root = machine(tmp_path, f"0::{group}\n", mounts, {"cpu.max": "250000 100000"})
    assert cpu_quota(root) == 2.5


def test_where_there_are_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(machine(tmp_path, "garbage\n\n", "garbage - \n1 2 3 - cgroup2 cgroup2 rw", {})) is None


def test_this_machine() -> None:
    quota = cpu_quota()
    assert quota is None or quota > 0
