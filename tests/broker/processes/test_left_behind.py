"""Which child processes have lost their daemon."""

from __future__ import annotations

from pathlib import Path

from weight_brokerd.processes import left_behind

MODULE = "weight_brokerd.cards.child.main"


def add(proc: Path, pid: int, parent: int, *command: str) -> None:
    process = proc / str(pid)
    process.mkdir()
    (process / "cmdline").write_bytes("".join(f"{word}\0" for word in command).encode())
    (process / "status").write_text(f"Name:\tpython\nPid:\t{pid}\nPPid:\t{parent}\n")


def test_a_child_whose_parent_is_no_daemon_is_left_behind(tmp_path: Path) -> None:
    add(tmp_path, 1, 0, "/sbin/init")
    add(tmp_path, 10, 1, "/opt/bin/python", "/opt/bin/weight-brokerd", "--config", "x")
    add(tmp_path, 20, 1, "python", "-m", "weight_brokerd")
    for pid, parent in ((11, 10), (21, 20), (31, 1), (9, 1)):
        add(tmp_path, pid, parent, "python", "-m", MODULE, "--role=sender")
    add(tmp_path, 41, 1, "python", "-m", f"{MODULE}.other")
    add(tmp_path, 51, 1, "less", f"docs/{MODULE}")
    assert left_behind.find(MODULE, tmp_path) == [9, 31]


def test_a_process_that_has_just_ended_is_not_left_behind(tmp_path: Path) -> None:
    add(tmp_path, 31, 1, "python", "-m", MODULE)
    (tmp_path / "31/status").unlink()
    assert left_behind.find(MODULE, tmp_path) == []
