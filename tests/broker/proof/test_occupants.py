"""Which processes use a device."""

from __future__ import annotations

from pathlib import Path

from weight_brokerd.proof.cuda.table import DEVICE_FILES
from weight_brokerd.proof.occupants import occupants


def process(root: Path, pid: int, *files: str) -> None:
    directory = root / str(pid) / "fd"
    directory.mkdir(parents=True)
    for number, file in enumerate(files):
        (directory / str(number)).symlink_to(file)


def test_processes_with_a_device_open_are_found(tmp_path: Path) -> None:
    process(tmp_path, 30, "/dev/null", "/dev/nvidia0")
    process(tmp_path, 4, "/dev/nvidia11")
    process(tmp_path, 5, "/dev/nvidiactl", "/dev/nvidia-uvm", "/home/dev/nvidia0")
    (tmp_path / "self").mkdir()
    (tmp_path / "6").mkdir()
    assert occupants(DEVICE_FILES, processes=tmp_path) == [4, 30]
