"""Whether a file system says reliably that a file has not changed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from weight_broker.integrations.checkpoint import cache, checkpoint_digest
from weight_broker.integrations.checkpoint.superblock import superblock_of


def host(root: Path, kind: str, *, boot: str = "boot", sysfs: str = "", file: Path) -> Path:
    """/proc and /sys of a host on which `file` is on a file system of this kind."""
    descriptor = os.open(file, os.O_RDONLY)
    facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    os.close(descriptor)
    mount = next(line.split()[1] for line in facts.splitlines() if line.startswith("mnt_id"))
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/fdinfo").symlink_to("/proc/self/fdinfo")
    (root / "proc/self/mountinfo").write_text(
        f"1 1 0:5 / /proc rw - proc proc rw\n{mount} 1 8:1 / / rw,relatime shared:1 - {kind} /dev/sda1 rw\n"
    )
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    (root / "proc/sys/kernel/random/boot_id").write_text(boot + "\n")
    (root / "sys/dev/block").mkdir(parents=True)
    (root / "sys/dev/block/8:1").symlink_to("../../devices/virtual/block/sda1")
    if sysfs:
        (root / "sys/fs" / sysfs / "sda1").mkdir(parents=True)
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("content")
    return path


@pytest.mark.parametrize(("kind", "sysfs"), [("ext4", "ext4"), ("ext3", "ext4"), ("xfs", "xfs"), ("f2fs", "f2fs")])
def test_local_file_systems_are_named_by_boot_and_mount(tmp_path: Path, file: Path, kind: str, sysfs: str) -> None:
    root = host(tmp_path / "host", kind, sysfs=sysfs, file=file)
    name = superblock_of(file, root)
    assert name is not None
    assert superblock_of(file, root) == name
    (root / "sys/fs" / sysfs / "kept").mkdir()  # so that the next directory has another number
    (root / "sys/fs" / sysfs / "sda1").rename(root / "sys/fs" / sysfs / "unmounted")
    (root / "sys/fs" / sysfs / "sda1").mkdir()
    assert superblock_of(file, root) != name
    (root / "proc/sys/kernel/random/boot_id").write_text("the next boot")
    assert superblock_of(file, host(tmp_path / "next", kind, boot="next", sysfs=sysfs, file=file)) != name


@pytest.mark.parametrize(
    "kind", ["squashfs", "erofs", "iso9660", "fuse.sshfs", "fuse", "nfs4", "cifs", "overlay", "9p"]
)
def test_images_user_space_and_networks_are_not_believed(tmp_path: Path, file: Path, kind: str) -> None:
    assert superblock_of(file, host(tmp_path / "host", kind, sysfs="ext4", file=file)) is None


def test_what_the_kernel_does_not_show_is_not_believed(tmp_path: Path, file: Path) -> None:
    assert superblock_of(file, host(tmp_path / "host", "ext4", file=file)) is None
    assert superblock_of(file, tmp_path / "absent") is None
    (tmp_path / "host/proc/self/mountinfo").write_text("1 1 0:5 / /proc rw - proc proc rw\n")
    assert superblock_of(file, tmp_path / "host") is None


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    done = subprocess.run(["mount", "-o", "loop,ro", image, place], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"no image can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True, timeout=60)


def image(directory: Path) -> Path:
    """A file system with this content, the same in every other respect."""
    for path in [directory, *directory.rglob("*")]:
        os.utime(path, (1_577_836_800, 1_577_836_800))
    made = directory.with_suffix(".img")
    made.write_bytes(bytes(8 << 20))
    uuid = "01234567-89ab-cdef-0123-456789abcdef"
    command = ["mkfs.ext4", "-q", "-U", uuid, "-E", f"hash_seed={uuid}", "-d", str(directory), str(made)]
    try:
        subprocess.run(command, check=True, timeout=60)
        for path in directory.iterdir():  # the time of change, which no program of the running system can choose
            for field, value in (("ctime", "20200101"), ("ctime_extra", "0")):
                order = f"set_inode_field /{path.name} {field} {value}"
                subprocess.run(["debugfs", "-w", "-R", order, str(made)], check=True, timeout=60, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no image can be made here: {error}")
    return made


def test_an_image_is_not_taken_for_the_one_that_was_mounted_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.ENVIRONMENT_VARIABLE, str(tmp_path / "cache.json"))
    base = write_checkpoint(tmp_path / "base", {"w": b"1" * 5000})
    tuned = write_checkpoint(tmp_path / "tuned", {"w": b"2" * 5000})
    expected = [checkpoint_digest(directory, cache=False) for directory in (base, tuned)]
    images = [image(directory) for directory in (base, tuned)]
    place = tmp_path / "mounted"
    place.mkdir()
    found = []
    for made in images:
        with mounted(made, place):
            found.append(checkpoint_digest(place))
    assert found == expected
