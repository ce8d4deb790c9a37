"""How much memory this process can still have."""

import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_FILES = {  # controllers in /proc/self/cgroup -> where their groups lie, and names in there; version 2, version 1
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can still be had without swapping (Linux; elsewhere all that is installed): the machine's, or what
    the nearest limit of a control group leaves, as a container has one."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        free = float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min([free, *_rooms(root)])


def _rooms(root: Path) -> Iterator[float]:
    """What each control group around this process still allows; files that can be dropped are not counted as used."""
    try:
        own = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, kinds, name in own:
        if kinds not in CGROUP_FILES:
            continue
        top, limit, usage, droppable = CGROUP_FILES[kinds]
        place = root / top / name.strip("/")
        for folder in (place, *place.parents):  # in a container the name may be the host's, and only the top be there
            if not folder.is_relative_to(root / top):
                break
            try:
                used = int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield float((folder / limit).read_text()) - used + int(stat.get(droppable, 0))
            except (OSError, ValueError):  # no such file, or no limit: "max"
                continue
