"""What the machine has to give: its memory, and the limits of control groups on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from localds.units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINUX = Path("/")

# Left to others: helper processes, buffers of the kernel, and allocators that round up.
_SHARE_LEFT = 20  # a twentieth
_LEAST_LEFT = 512 << 20
_LEAST_LEFT_IN_GROUP = 128 << 20  # where nobody else's memory counts

_SHARE_OF_OTHER_SYSTEMS = 0.7


@dataclass(frozen=True, slots=True)
class Group:
    """The files of a control group: its limits, what it uses, and of what kind that is."""

    limits: tuple[Path, ...]
    usage: Path
    statistics: Path
    cache: tuple[str, ...]  # the statistics of file cache, which gives way to other memory


def total_memory(root: Path = _LINUX) -> int | None:
    """Bytes of RAM that this process could have: the machine's, or a control group's limit.

    `root` is where Linux's files are found, for tests.
    """
    limits = [_installed(root), *(_limit(group) for group in _groups(root))]
    return min((limit for limit in limits if limit is not None), default=None)


def processor_name() -> str | None:
    """The processor's name, as its maker writes it; None where the system does not say."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        return found.stdout.strip() or None
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1].strip() if match else None


def available_memory(root: Path = _LINUX) -> int | None:
    """Bytes that this process may still take: free RAM and every control group's room.

    None where the system does not say (macOS).
    """
    return min((room for room, _ in _rooms(root)), default=None)


def reserve(root: Path = _LINUX) -> int:
    """Bytes of the available memory to leave alone, so that each limit keeps what it must."""
    rooms = _rooms(root)
    if not rooms:
        return _LEAST_LEFT
    return min(room for room, _ in rooms) - _left(rooms)


def budget_for(ram: int | str | None) -> int | None:
    """Bytes that `ram` stands for: a number of them, a size like "12GiB", None for the default.

    Raises `ValueError` for a text that is no size.
    """
    if ram is None:
        return default_budget()
    return parse_size(ram) if isinstance(ram, str) else ram


def default_budget(root: Path = _LINUX) -> int | None:
    """Bytes that a model may take unless the user says otherwise; None where nothing is known."""
    rooms = _rooms(root)
    if rooms:
        return max(_left(rooms), 0)
    total = total_memory(root)
    return None if total is None else int(total * _SHARE_OF_OTHER_SYSTEMS)


def _left(rooms: list[tuple[int, int]]) -> int:
    """What may be taken so that each limit keeps what it must."""
    return min(room - left for room, left in rooms)


def _rooms(root: Path) -> list[tuple[int, int]]:
    """What may still be taken under each limit, and how much of it is left to others."""
    rooms = [(room, _LEAST_LEFT_IN_GROUP) for room in _group_rooms(root)]
    free = _free(root)
    if free is not None:
        rooms.append((free, max(_LEAST_LEFT, (total_memory(root) or 0) // _SHARE_LEFT)))
    return rooms


def _installed(root: Path) -> int | None:
    found = _meminfo(root, "MemTotal")
    if found is not None or root != _LINUX:
        return found
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _free(root: Path) -> int | None:
    return _meminfo(root, "MemAvailable")


def _meminfo(root: Path, name: str) -> int | None:
    text = _read(root / "proc/meminfo")
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _group_rooms(root: Path) -> list[int]:
    """Room under each limit of this process's control groups, ancestors included."""
    rooms = []
    for group in _groups(root):
        limit, used = _limit(group), _number(group.usage)
        if limit is not None and used is not None:
            rooms.append(max(limit - max(used - _cache(group), 0), 0))
    return rooms


def _groups(root: Path) -> Iterator[Group]:
    """This process's control groups that count memory, from its own to the root of the tree."""
    for line in _read(root / "proc/self/cgroup").split("\n"):
        _, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon:
            continue
        if not controllers:
            # Beside version 1, version 2 has a place of its own.
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                yield from map(_group_2, _upwards(root / mount, path))
        elif "memory" in controllers.split(","):
            yield from map(_group_1, _upwards(root / "sys/fs/cgroup/memory", path))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The folder of a group and of its ancestors below `mount`, `mount` itself last.

    In a container the path may be that of the host, which is not there: then only what is counts.
    """
    folder = mount / path.lstrip("/")
    for level in (folder, *folder.parents):
        if level != mount and mount not in level.parents:
            return
        if level.is_dir():
            yield level


def _group_2(folder: Path) -> Group:
    return Group(
        # At `high` the group is throttled, at `max` somebody is killed.
        limits=(folder / "memory.max", folder / "memory.high"),
        usage=folder / "memory.current",
        statistics=folder / "memory.stat",
        cache=("active_file", "inactive_file"),
    )


def _group_1(folder: Path) -> Group:
    return Group(
        limits=(folder / "memory.limit_in_bytes",),
        usage=folder / "memory.usage_in_bytes",
        statistics=folder / "memory.stat",
        cache=("total_active_file", "total_inactive_file"),
    )


def _limit(group: Group) -> int | None:
    """The lowest limit in bytes; None where there is none, which is written "max"."""
    limits = [_number(path) for path in group.limits]
    return min((limit for limit in limits if limit is not None), default=None)


def _cache(group: Group) -> int:
    """Bytes of file cache that are charged to the group."""
    names = "|".join(group.cache)
    found = re.findall(rf"^(?:{names}) (\d+)$", _read(group.statistics), re.MULTILINE)
    return sum(map(int, found))


def _number(path: Path) -> int | None:
    """A count of bytes; None for "max", or where there is no such thing."""
    match = re.fullmatch(r"(\d+)\s*", _read(path))
    return int(match[1]) if match else None


def _read(path: Path) -> str:
    """A file's text, empty where it cannot be read; names of groups are any bytes."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except (OSError, ValueError):
        return ""
