"""How much memory may still be used: the host's, or the tightest control group's if that is less."""

from __future__ import annotations

from pathlib import Path

import pytest

from weight_broker.drivers.available_memory import available_bytes

MEMINFO = "MemTotal:       2000 kB\nMemFree:         500 kB\nMemAvailable:   1000 kB\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 1000 * 1024),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/service\n",
                "sys/fs/cgroup/service/memory.max": "max\n",
                "sys/fs/cgroup/service/memory.current": "5000\n",
            },
            1000 * 1024,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/slice/service\n",
                "sys/fs/cgroup/slice/service/memory.max": "90000\n",
                "sys/fs/cgroup/slice/service/memory.current": "50000\n",
                "sys/fs/cgroup/slice/memory.max": "80000\n",
                "sys/fs/cgroup/slice/memory.current": "60000\n",
                "sys/fs/cgroup/slice/memory.stat": "anon 1\ninactive_file 7000\n",
            },
            27_000,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "80000\n",
                "sys/fs/cgroup/memory.current": "79000\n",
                "sys/fs/cgroup/memory.stat": "anon 9000\nshmem 8000\nactive_file 50000\ninactive_file 7000\n"
                "file_dirty 3000\nfile_writeback 1000\nslab_reclaimable 500\nunevictable 900\n",
            },
            1_000 + 50_000 + 7_000 - 3_000 - 1_000 + 500,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "80000\n",
                "sys/fs/cgroup/memory.current": "79000\n",
                "sys/fs/cgroup/memory.stat": "active_file 500\nfile_dirty 3000\n",
            },
            1_000,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/../outside\n",
                "sys/fs/cgroup/memory.max": "70000\n",
                "sys/fs/cgroup/memory.current": "80000\n",
            },
            0,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/job\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "20000\n",
            },
            40_000,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "60000\n",
                "sys/fs/cgroup/memory/job/memory.stat": "active_file 1\ninactive_file 1\ndirty 1\n"
                "total_active_file 20000\ntotal_inactive_file 5000\ntotal_dirty 700\ntotal_writeback 300\n",
            },
            24_000,
        ),
    ],
    ids=[
        "unknown",
        "host",
        "unlimited group",
        "group above",
        "file pages in use",
        "file pages not written yet",
        "container",
        "version 1",
        "version 1, groups below",
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    assert available_bytes(write(tmp_path, files)) == expected


def test_this_host_says_how_much_it_has() -> None:
    available = available_bytes()
    assert available is not None
    assert available > 1 << 20
