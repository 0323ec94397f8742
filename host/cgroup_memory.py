"""The memory that a container may still take, where Linux limits it: libraries and the system tell that of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # version 1 writes the largest number of pages there is


def at_most(free: int, groups: Path = GROUPS, mount: Path = MOUNT) -> int:
    """`free` bytes, of the machine, or those until the nearest limit of this process's groups, where they are fewer.

    Pages of files that nobody has read again count as free: they are the first that the kernel takes back.
    """
    return min([free, *(room for folder in _folders(groups, mount) if (room := _room(folder)) is not None)])


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """The group of this process and those it lies in, of both versions."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        # In a container the path is often the machine's, and the container's own group is the root.
        place = root / path.lstrip("/")
        while place != root and root in place.parents:
            yield place
            place = place.parent
        yield root


def _room(folder: Path) -> int | None:
    for limit, usage, again in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
            stated = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # there is none, it is "max", or it is closed to us
            continue
        if most < UNLIMITED:
            return max(0, most - used + int(stated.get(again, 0)))
    return None
