"""How much memory there is, in a container too."""

import pytest

from rung.core.memory import available_memory


@pytest.mark.parametrize(
    ("version", "groups"),
    [
        ("0::/a/b", {"a": ("5000000", "3000000", "inactive_file 1000000")}),
        ("0::/the/hosts/name", {"": ("5000000", "3000000", "inactive_file 1000000")}),
        ("7:cpu:/x\n4:memory:/a", {"a": ("5000000", "2500000", "total_inactive_file 500000")}),
        ("0::/a", {"": ("4000000", "1000000", ""), "a": ("max", "1", "")}),
        ("0::/a", {"a": ("max", "1000000", "")}),
        ("0::/", {}),
    ],
)
def test_a_containers_limit_counts_as_the_memory_there_is(tmp_path, version, groups):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text(version + "\n")
    first = "memory:" in version
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for group, texts in groups.items():
        place = tmp_path / "sys/fs/cgroup" / ("memory" if first else "") / group
        place.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), texts, strict=True):
            (place / name).write_text(text + "\n" * bool(text))
    limited = any(texts[0] != "max" for texts in groups.values())
    assert available_memory(tmp_path) == (3_000_000 if limited else 8_192_000)
