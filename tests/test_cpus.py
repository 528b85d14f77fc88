"""The number of CPUs that a process may use under the control groups of containers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from act_pipeline.core.cpus import available_cpus, cpu_quota

V2 = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
V1 = "32 31 0:29 {group} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
HYBRID = [V1.format(group="/"), "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"]


def machine(root: Path, groups: list[str], mounts: list[str], files: dict[str, str]) -> Path:
    """Write the control group files of Linux below ``root``."""
    content = {"proc/self/cgroup": "\n".join(groups), "proc/self/mountinfo": "\n".join(mounts), **files}
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        (["0::/"], [V2], {"sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        (["0::/"], [V2], {"sys/fs/cgroup/cpu.max": "20000 100000"}, 1),
        (["0::/"], [V2], {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (["0::/a/b"], [V2], {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 3),
        (
            ["0::/a/b"],
            [V2],
            {"sys/fs/cgroup/a/cpu.max": "300000 100000", "sys/fs/cgroup/a/b/cpu.max": "90000 50000"},
            2,
        ),
        # The quota of another group does not apply.
        (["0::/a"], [V2], {"sys/fs/cgroup/b/cpu.max": "100000 100000"}, None),
        # Outside the container's view.
        (["0::/../../x"], [V2], {"sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        (
            ["5:cpu,cpuacct:/", "0::/"],
            HYBRID,
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            ["5:cpu,cpuacct:/"],
            HYBRID,
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        # A container whose group is mounted as the root, while /proc shows the host's name of the group.
        (
            ["5:cpu,cpuacct:/docker/0123", "4:memory:/docker/0123"],
            [V1.format(group="/docker/0123")],
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "25000",
            },
            2,
        ),
        (
            ["5:cpu,cpuacct:/docker/0123"],
            [V1.format(group="/another")],
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (["0::/", "nonsense", "::"], [V2, "nonsense", "1 2 - x"], {"sys/fs/cgroup/cpu.max": "nonsense"}, None),
        (["0::/"], [V2], {"sys/fs/cgroup/cpu.max": "100000 0"}, None),
    ],
)
def test_the_smallest_quota_of_the_groups_around_counts(
    tmp_path: Path, groups: list[str], mounts: list[str], files: dict[str, str], expected: int | None
) -> None:
    root = machine(tmp_path, groups, mounts, files)
    assert cpu_quota(root) == expected
    allowed = len(os.sched_getaffinity(0))
    assert available_cpus(root) == (allowed if expected is None else min(allowed, expected))


def test_a_quota_above_the_affinity_gives_no_more_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = machine(tmp_path, ["0::/"], [V2], {"sys/fs/cgroup/cpu.max": "600000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert available_cpus(root) == 6
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    assert available_cpus(root) == 2


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
