"""How much CPU time the control groups of Linux grant this process."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["cpu_quota"]


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU time that this process may use, in cores, or None where nothing limits it.

    A group gets no more than the groups that it is in, so the smallest quota on the way up counts. Reads
    ``cpu.max`` of version 2 of control groups and ``cpu.cfs_quota_us`` of version 1 (the kernel's
    ``admin-guide/cgroup-v2.rst`` and ``scheduler/sched-bwc.rst``).

    Args:
        root: where ``/proc`` and the mounted control groups are looked for.

    """
    return min((quota for folder in _folders(root) if (quota := _quota(folder)) is not None), default=None)


def _folders(root: Path) -> Iterator[Path]:
    """The folders of this process's groups, and of all groups that they are in."""
    groups = _groups(root)
    for version, mounted, mount_point in _mounts(root):
        group = groups.get(version)
        if group is None:
            continue
        inside = PurePosixPath(group)
        if inside.is_relative_to(mounted) and ".." not in inside.parts:
            inside = inside.relative_to(mounted)
        else:  # a container may see its own part of the tree only, and its group as if that were all
            inside = PurePosixPath()
        folder = root / mount_point.lstrip("/")
        yield folder
        for part in inside.parts:
            folder /= part
            yield folder


def _groups(root: Path) -> dict[int, str]:
    """The group of this process in each version's tree, from ``/proc/self/cgroup``."""
    groups = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")  # number:controllers:path
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            groups[2] = path
        elif "cpu" in controllers.split(","):
            groups[1] = path
    return groups


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    """The trees of groups by ``/proc/self/mountinfo``, see proc(5): the version, which group is mounted, and
    where.
    """
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *options) = before.split(), after.split() or [""]
        if len(fields) < 5 or not options:
            continue
        mounted, mount_point = fields[3:5]
        if kind == "cgroup2":
            yield 2, mounted, mount_point
        elif kind == "cgroup" and "cpu" in options[-1].split(","):
            yield 1, mounted, mount_point


def _quota(folder: Path) -> float | None:
    """The quota of one group, in cores."""
    try:
        if (folder / "cpu.max").exists():
            granted, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            return None if granted == "max" else int(granted) / int(period)
        granted_us = int((folder / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_us = int((folder / "cpu.cfs_period_us").read_text(encoding="ascii"))
        return granted_us / period_us if granted_us > 0 else None  # -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
