"""Memory and limits, on made-up trees of Linux's files."""

import os
from pathlib import Path

import pytest

from localds.memory.machine import available_memory, default_budget, reserve, total_memory

GIB = 1 << 30
NO_LIMIT_1 = "9223372036854771712"


def make(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    return root


def meminfo(total: int, available: int) -> str:
    return f"MemTotal:  {total // 1024} kB\nMemFree: 1 kB\nMemAvailable:  {available // 1024} kB\n"


def group_2(folder: str, limit: object, usage: int, cache: int = 0, high: object = "max") -> dict:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.high": high,
        f"{folder}/memory.current": usage,
        f"{folder}/memory.stat": f"anon 5\nactive_file {cache - cache // 2}\n"
        f"inactive_file {cache // 2}\n",
    }


def group_1(folder: str, limit: object, usage: int, cache: int = 0) -> dict:
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": usage,
        f"{folder}/memory.stat": f"active_file 1\ntotal_active_file {cache}\n"
        "total_inactive_file 0\n",
    }


def test_without_groups_it_is_the_free_memory(tmp_path: Path) -> None:
    root = make(tmp_path, {"proc/meminfo": meminfo(32 * GIB, 20 * GIB)})
    assert total_memory(root) == 32 * GIB
    assert available_memory(root) == 20 * GIB
    assert reserve(root) == 32 * GIB // 20
    assert default_budget(root) == 20 * GIB - 32 * GIB // 20


@pytest.mark.parametrize("mount", ["sys/fs/cgroup", "sys/fs/cgroup/unified"])
def test_version_2_counts_every_ancestor(tmp_path: Path, mount: str) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": "0::/a/b\n",
        **group_2(f"{mount}/a/b", "max", GIB),
        **group_2(f"{mount}/a", 6 * GIB, 2 * GIB),
    }
    root = make(tmp_path, files)
    assert total_memory(root) == 6 * GIB
    assert available_memory(root) == 4 * GIB
    assert reserve(root) == 128 << 20
    assert default_budget(root) == 4 * GIB - (128 << 20)


@pytest.mark.parametrize(
    ("free", "room", "budget"),
    [
        # In MiB, on 20 GiB in all: 1024 of free memory are left, and 128 of a group's.
        (10240, 4096, 4096 - 128),
        (10240, 9344, 9344 - 128),
        (10240, 10000, 10240 - 1024),
        (10240, 10241, 10240 - 1024),
        (500, 10000, 0),
    ],
)
def test_every_limit_keeps_a_reserve(tmp_path: Path, free: int, room: int, budget: int) -> None:
    mib = 1 << 20
    files = {
        "proc/meminfo": meminfo(20 * GIB, free * mib),
        "proc/self/cgroup": "0::/a\n",
        **group_2("sys/fs/cgroup/a", 20 * GIB, 20 * GIB - room * mib),
    }
    root = make(tmp_path, files)
    assert available_memory(root) == min(free, room) * mib
    assert default_budget(root) == budget * mib


def test_file_cache_gives_way_and_high_is_a_limit(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": "0::/a\n",
        **group_2("sys/fs/cgroup/a", 6 * GIB, 4 * GIB, cache=3 * GIB, high=5 * GIB),
    }
    assert available_memory(make(tmp_path, files)) == 4 * GIB


def test_version_1(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/job/1\n3:cpuset:/\n0::/\n",
        **group_1("sys/fs/cgroup/memory/job/1", 5 * GIB, 3 * GIB, cache=GIB),
        **group_1("sys/fs/cgroup/memory/job", NO_LIMIT_1, 9 * GIB),
        **group_1("sys/fs/cgroup/memory", NO_LIMIT_1, 9 * GIB),
    }
    root = make(tmp_path, files)
    assert available_memory(root) == 3 * GIB
    assert total_memory(root) == 5 * GIB


def test_a_path_of_the_host_leaves_the_mount_itself(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": "4:memory:/docker/abc\n",
        **group_1("sys/fs/cgroup/memory", 2 * GIB, GIB),
    }
    assert available_memory(make(tmp_path, files)) == GIB


@pytest.mark.parametrize("text", ["", "garbage", "-", "4:memory", "::::", "0::../../..\n"])
def test_garbage_is_passed_over(tmp_path: Path, text: str) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": text,
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "none",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "",
    }
    assert available_memory(make(tmp_path, files)) == 20 * GIB


@pytest.mark.parametrize("text", ["", "\n", "0\n", "0:\n", "4:cpu:/a\n"])
def test_files_of_no_group_of_ours_do_not_count(tmp_path: Path, text: str) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": text,
        **group_2("sys/fs/cgroup", 2 * GIB, GIB),
        **group_1("sys/fs/cgroup/memory", 2 * GIB, GIB),
    }
    assert available_memory(make(tmp_path, files)) == 20 * GIB


@pytest.mark.parametrize("limit", ["-5", "6 GiB", "1_000", "", b"\xff"])
def test_a_limit_that_is_no_number_is_none(tmp_path: Path, limit: object) -> None:
    files = {
        "proc/meminfo": meminfo(32 * GIB, 20 * GIB),
        "proc/self/cgroup": "0::/a\n",
        **group_2("sys/fs/cgroup/a", limit, GIB),
    }
    root = make(tmp_path, files)
    assert available_memory(root) == 20 * GIB
    assert total_memory(root) == 32 * GIB


def test_statistics_that_are_garbage_count_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/a\n",
        **group_2("sys/fs/cgroup/a", 6 * GIB, 4 * GIB),
        "sys/fs/cgroup/a/memory.stat": b"active_file \nactive_file x\n\xff 3\ninactive_file 7\n",
    }
    assert available_memory(make(tmp_path, files)) == 2 * GIB + 7


def test_a_group_may_have_any_name(tmp_path: Path) -> None:
    folder = os.fsdecode(b"sys/fs/cgroup/\xff\xc2\x85")
    files = {
        "proc/self/cgroup": b"0::/\xff\xc2\x85\n",
        **group_2(folder, 6 * GIB, GIB),
    }
    try:
        root = make(tmp_path, files)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert available_memory(root) == 5 * GIB


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a\n", **group_2("sys/fs/cgroup/a", GIB, 2 * GIB)}
    root = make(tmp_path, files)
    assert available_memory(root) == 0
    assert default_budget(root) == 0


def test_systems_that_do_not_say(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None
    assert default_budget(tmp_path) is None


def test_here_it_is_at_most_the_machine() -> None:
    available = available_memory()
    assert available is None or 0 < available < 2**50
