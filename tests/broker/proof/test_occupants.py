"""Whoever has a card open is found by its descriptors."""

from __future__ import annotations

import os
from pathlib import Path

from weight_brokerd.proof.occupants import occupants

CARD = r"/dev/davinci\d+"


def process(proc: Path, pid: int, *targets: str) -> None:
    descriptors = proc / str(pid) / "fd"
    descriptors.mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes(b"vllm\0serve\0model\0--port\0")
    for number, target in enumerate(targets):
        (descriptors / str(number)).symlink_to(target)


def test_a_process_with_a_card_is_named_with_its_command(tmp_path: Path) -> None:
    process(tmp_path, 7, "/dev/null", "/dev/davinci3")
    assert occupants(CARD, tmp_path) == {7: "vllm serve model"}


def test_a_process_with_other_devices_or_the_manager_alone_is_none(tmp_path: Path) -> None:
    process(tmp_path, 8, "/dev/davinci_manager", "/dev/dri/card0")
    assert occupants(CARD, tmp_path) == {}


def test_the_asking_process_and_what_is_no_process_are_left_out(tmp_path: Path) -> None:
    process(tmp_path, os.getpid(), "/dev/davinci0")
    (tmp_path / "meminfo").write_text("")
    (tmp_path / "9").mkdir()
    assert occupants(CARD, tmp_path) == {}
