"""How many threads there are by default: cores of the affinity, quotas of the control groups."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from localds import _native

if TYPE_CHECKING:
    from pathlib import Path

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def version1(group: str, quota: str, period: str = "100000") -> dict[str, str]:
    folder = f"sys/fs/cgroup/cpu{group}"
    return {
        f"{folder}/cpu.cfs_quota_us": f"{quota}\n",
        f"{folder}/cpu.cfs_period_us": f"{period}\n",
    }


def version2(group: str, limit: str, mount: str = "sys/fs/cgroup") -> dict[str, str]:
    return {f"{mount}{group}/cpu.max": f"{limit}\n"}


IN_VERSION2 = {"proc/self/cgroup": "0::/user.slice/job\n"}
IN_VERSION1 = {
    "proc/self/cgroup": "9:memory:/other\n4:cpu,cpuacct:/docker/job\n3:cpuset:/docker/job\n"
}
IN_BOTH = {"proc/self/cgroup": "4:cpuacct,cpu:/job\n1:name=systemd:/job\n0::/job\n"}

CASES = {
    "version 2, no limit": (IN_VERSION2 | version2("/user.slice/job", "max 100000"), 0),
    "version 2, some cores": (IN_VERSION2 | version2("/user.slice/job", "600000 200000"), 3),
    "version 2, a core and a half": (IN_VERSION2 | version2("/user.slice/job", "150000 100000"), 1),
    "version 2, half a core": (IN_VERSION2 | version2("/user.slice/job", "50000 100000"), 1),
    "version 2, an ancestor is tighter": (
        IN_VERSION2
        | version2("/user.slice/job", "800000 100000")
        | version2("/user.slice", "200000 100000"),
        2,
    ),
    "version 2, an ancestor is wider": (
        IN_VERSION2
        | version2("/user.slice/job", "300000 100000")
        | version2("/user.slice", "max 100000")
        | version2("", "800000 100000"),
        3,
    ),
    "version 2, a neighbour's limit": (
        IN_VERSION2 | version2("/user.slice/job2", "100000 100000"),
        0,
    ),
    # A container sees its own group as the root, but may be told its path on the host.
    "version 2, mounted from the group on": (IN_VERSION2 | version2("", "200000 100000"), 2),
    "version 1, no limit": (IN_VERSION1 | version1("/docker/job", "-1"), 0),
    "version 1, a core and a half": (IN_VERSION1 | version1("/docker/job", "150000"), 1),
    "version 1, another period": (IN_VERSION1 | version1("/docker/job", "150000", "50000"), 3),
    "version 1, an ancestor is tighter": (
        IN_VERSION1 | version1("/docker/job", "-1") | version1("/docker", "200000"),
        2,
    ),
    "version 1, another controller's group": (IN_VERSION1 | version1("/other", "100000"), 0),
    "version 1, no period": (
        IN_VERSION1 | {"sys/fs/cgroup/cpu/docker/job/cpu.cfs_quota_us": "150000\n"},
        0,
    ),
    "both, limit in version 1": (
        IN_BOTH
        | version1("/job", "400000")
        | version2("/job", "max 100000", "sys/fs/cgroup/unified"),
        4,
    ),
    "both, limit in version 2": (
        IN_BOTH
        | version1("/job", "-1")
        | version2("/job", "500000 100000", "sys/fs/cgroup/unified"),
        5,
    ),
    "both, the tighter limit": (
        IN_BOTH
        | version1("/job", "400000")
        | version2("/job", "200000 100000", "sys/fs/cgroup/unified"),
        2,
    ),
    "no files at all": ({}, 0),
    "groups without files": (IN_VERSION1, 0),
    "files without groups": (version2("", "100000 100000"), 0),
    "an empty file": (IN_VERSION2 | version2("/user.slice/job", ""), 0),
    "words for numbers": (IN_VERSION2 | version2("/user.slice/job", "many cores"), 0),
    "no period": (IN_VERSION2 | version2("/user.slice/job", "150000"), 0),
    "a period of zero": (IN_VERSION2 | version2("/user.slice/job", "150000 0"), 0),
    "a negative quota": (IN_VERSION2 | version2("/user.slice/job", "-5 100000"), 0),
    "more cores than an int": (
        IN_VERSION2 | version2("/user.slice/job", "17592186044415 1000"),
        1_000_000,
    ),
    "groups that are garbage": ({"proc/self/cgroup": "\n::\n:::\n0\ncpu\n\0\xff:cpu:\n"}, 0),
}


@linux
@pytest.mark.parametrize(("files", "cores"), CASES.values(), ids=CASES.keys())
def test_quota_of_control_groups(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    assert _native.quota_cores(write(tmp_path, files)) == cores


@linux
def test_hardware_threads_of_a_core_count_once(tmp_path: Path) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    assert _native.physical_cores(str(tmp_path)) == len(allowed), "without files: all of them"
    pairs = {siblings.format(cpu): f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}\n" for cpu in allowed}
    expected = len({cpu // 2 for cpu in allowed})
    assert _native.physical_cores(write(tmp_path, pairs)) == expected
