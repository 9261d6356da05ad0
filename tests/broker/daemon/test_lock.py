"""One broker for each runtime directory, whatever becomes of the lock file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from weight_brokerd.daemon.lock import AlreadyRunningError, RuntimeLock

HOLDER = """
import sys, time
from pathlib import Path
from weight_brokerd.daemon.lock import RuntimeLock
RuntimeLock.take(Path(sys.argv[1])).write(int(sys.argv[2]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start_holder(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a process that holds the lock and has recorded a mark."""
    with ExitStack() as stack:

        def start(mark: int) -> subprocess.Popen[str]:
            holder = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(tmp_path), str(mark)], stdout=subprocess.PIPE, text=True
            )
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            assert holder.stdout is not None
            stack.callback(holder.stdout.close)
            assert holder.stdout.readline() == "held\n"
            return holder

        yield start


def test_a_second_broker_is_refused_and_told_the_first_ones_pid(
    tmp_path: Path, start_holder: Callable[[int], subprocess.Popen[str]]
) -> None:
    holder = start_holder(42)
    before = (tmp_path / "lock").read_bytes()
    with pytest.raises(AlreadyRunningError, match=f"{tmp_path}: process {holder.pid}") as caught:
        RuntimeLock.take(tmp_path)
    assert caught.value.pid == holder.pid
    assert (tmp_path / "lock").read_bytes() == before, "the refused broker changed the file"


def test_a_kill_frees_the_lock_and_keeps_the_mark(
    tmp_path: Path, start_holder: Callable[[int], subprocess.Popen[str]]
) -> None:
    holder = start_holder(2**64 - 1)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RuntimeLock.take(tmp_path) as lock:
        assert lock.generation_mark() == 2**64 - 1


def test_the_first_broker_finds_no_mark(tmp_path: Path) -> None:
    with RuntimeLock.take(tmp_path) as lock:
        assert lock.generation_mark() == 0


def test_the_lock_ends_with_its_context(tmp_path: Path) -> None:
    with RuntimeLock.take(tmp_path) as lock:
        lock.write(7)
    with RuntimeLock.take(tmp_path) as lock:
        assert lock.generation_mark() == 7


@pytest.mark.parametrize("content", [b"", b"pid", b"\xff" * 200, b"pid 0000000001 generation x", b"7\n" * 100])
def test_a_damaged_record_counts_as_none_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with RuntimeLock.take(tmp_path) as lock:
        assert lock.generation_mark() == 0
        lock.write(9)
        assert lock.generation_mark() == 9
    text = (tmp_path / "lock").read_text()
    assert text == f"pid {os.getpid():010d} generation {9:020d}\n"


def test_a_lock_file_that_was_removed_does_not_let_a_second_broker_in(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "attach.sock"))
        listener.listen(1)
        with pytest.raises(AlreadyRunningError, match="already runs"):
            RuntimeLock.take(tmp_path)
    with RuntimeLock.take(tmp_path) as lock:  # what the dead broker left behind keeps nobody out
        assert lock.generation_mark() == 0


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        RuntimeLock.take(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RuntimeLock.take(tmp_path / "missing")


def test_being_refused_leaks_no_descriptor(
    tmp_path: Path, start_holder: Callable[[int], subprocess.Popen[str]]
) -> None:
    start_holder(1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(AlreadyRunningError):
            RuntimeLock.take(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
