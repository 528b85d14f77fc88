"""Number of CPUs that this process may use, from its affinity and a container's CPU quota."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def available_cpus(root: Path = _ROOT) -> int:
    """Return the number of CPUs that this process may use, at least 1.

    Args:
        root: the root of the file system, for tests.
    """
    cpus = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    quota = cpu_quota(root)
    return cpus if quota is None else min(cpus, quota)


def cpu_quota(root: Path = _ROOT) -> int | None:
    """Return the CPU quota of Linux control groups (``docker run --cpus``), rounded up; None: no limit.

    It is the smallest quota of the process's group and all visible parent groups.

    Args:
        root: the root of the file system, for tests.
    """
    shares = [share for folder in _group_folders(root) for share in (_share_v2(folder), _share_v1(folder)) if share]
    return max(1, math.ceil(min(shares))) if shares else None


def _share_v2(folder: Path) -> float | None:
    """Return the number of CPUs from ``cpu.max``: ``QUOTA PERIOD`` in microseconds, or ``max PERIOD``."""
    return _share(*(_read(folder / "cpu.max").split() + ["", ""])[:2])


def _share_v1(folder: Path) -> float | None:
    """Return the number of CPUs from ``cpu.cfs_quota_us`` (-1: no limit) and ``cpu.cfs_period_us``."""
    return _share(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _share(quota: str, period: str) -> float | None:
    if not (re.fullmatch("[0-9]{1,18}", quota) and re.fullmatch("[0-9]{1,18}", period)):
        return None
    return int(quota) / int(period) if int(quota) and int(period) else None


def _group_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups that control CPU time, and of all their parent groups."""
    own = dict(_own_groups(root))
    for version, group, mount_point in _mounts(root):
        if version not in own:
            continue
        mounted = root / mount_point.relative_to("/")
        # In a container its own group may be mounted as the root, while /proc shows the host's name of the group.
        inside = PurePosixPath(own[version])
        inside = inside.relative_to(group) if inside.is_relative_to(group) else PurePosixPath()
        if ".." in inside.parts:
            inside = PurePosixPath()
        for part in (inside, *inside.parents):
            yield mounted / part


def _own_groups(root: Path) -> Iterator[tuple[int, str]]:
    """Yield (version, group) from ``/proc/self/cgroup``, whose lines are ``ID:CONTROLLERS:GROUP``."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _mounts(root: Path) -> Iterator[tuple[int, str, PurePosixPath]]:
    """Yield (version, mounted group, mount point) from ``/proc/self/mountinfo``."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, options = before.split(), after.split()
        if len(fields) < 5 or len(options) < 3:
            continue
        group, mount_point = (_unescape(field) for field in fields[3:5])
        if not mount_point.startswith("/"):
            continue
        if options[0] == "cgroup2":
            yield 2, group, PurePosixPath(mount_point)
        elif options[0] == "cgroup" and "cpu" in options[2].split(","):
            yield 1, group, PurePosixPath(mount_point)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found.group(1), 8)), field)


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""
