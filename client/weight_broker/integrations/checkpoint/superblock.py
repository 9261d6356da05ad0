"""Which mounted file system a file is on, if the kernel keeps its device, inode, size and times meaningful.

They name the content of a file only while one file system of this kernel is mounted. An image that is mounted in the
place of another may have the same numbers, and times that its maker chose; device numbers return after an unmount and
after a boot; on network file systems and in user space another machine or a program chooses them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_SYSFS = {"ext2": "ext4", "ext3": "ext4", "ext4": "ext4", "xfs": "xfs", "f2fs": "f2fs"}
"""Local file systems that have a directory in /sys/fs while mounted, by the name in the table of mounts. The kernel
never uses the inode number of such a directory again before the next boot."""
_LIVES_IN_MEMORY = "tmpfs"


def superblock_of(file: Path, root: Path = Path("/")) -> str | None:
    """Names the mount since its beginning, the same in every container; None if it is of another kind than those above
    or unknown. `root` is the directory of /proc and /sys."""
    with suppress(OSError, ValueError):
        device, kind = _mount(file, root)
        boot = (root / "proc/sys/kernel/random/boot_id").read_text().strip()
        if kind == _LIVES_IN_MEMORY:  # written by this kernel only, which sets the time of each change
            return f"{boot} {kind} {device}"
        if kind in _SYSFS:
            name = os.path.basename(os.readlink(root / "sys/dev/block" / device))
            mounted = (root / "sys/fs" / _SYSFS[kind] / name).stat()
            return f"{boot} {kind} {device} {mounted.st_ino}"
    return None


def _mount(file: Path, root: Path) -> tuple[str, str]:
    """Device and kind of the file system, from the table of mounts."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        facts = (root / f"proc/self/fdinfo/{descriptor}").read_text()
    finally:
        os.close(descriptor)
    [mount] = [line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id:")]
    for line in (root / "proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        if fields[0] == mount:
            return fields[2], fields[fields.index("-") + 1]
    raise ValueError(f"mount {mount} is not in the table")
