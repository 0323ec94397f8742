"""The memory a container may still take, as both versions of Linux's control groups tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hotpath.host import cgroup_memory

FREE = 64 << 30  # of the machine
NEW = ("memory.max", "memory.current", "inactive_file")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group(folder: Path, names: tuple[str, str, str], limit: object, used: int = 0, again: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names[:2], (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} {again}\n")


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("0::/a/b", "a", NEW),
        ("0::/", "", NEW),
        ("0::/the/machines/own", "", NEW),  # in a container, whose own group is mounted as the root
        ("4:cpu,memory:/a/b", "memory/a/b", OLD),
        ("4:memory:/docker/0123", "memory", OLD),
    ],
)
def test_the_nearest_limit_counts(line: str, place: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    (tmp_path / "groups").write_text(f"9:name=systemd:/x\n3:cpuset:/a\n{line}\n")
    group(tmp_path / place, names, 8 << 30, 3 << 30, 1 << 30)
    assert cgroup_memory.at_most(FREE, tmp_path / "groups", tmp_path) == 6 << 30
    assert cgroup_memory.at_most(1 << 30, tmp_path / "groups", tmp_path) == 1 << 30, "the machine has less"
    group(tmp_path / place, names, "max" if names == NEW else (1 << 63) - 4096)
    assert cgroup_memory.at_most(FREE, tmp_path / "groups", tmp_path) == FREE
    assert cgroup_memory.at_most(FREE, tmp_path / "none", tmp_path) == FREE, "no Linux"
