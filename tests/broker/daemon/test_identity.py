"""Names and numbers that must survive a restart, or must not repeat after one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.daemon.identity import GENERATIONS_PER_RUN, generation_range, host_id

MACHINE_ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def machine_id_file(tmp_path: Path) -> Path:
    path = tmp_path / "machine-id"
    path.write_text(MACHINE_ID + "\n")
    return path


def test_a_configured_host_id_is_taken_as_it_is(machine_id_file: Path) -> None:
    assert host_id("rack-1", machine_id_file=machine_id_file) == "rack-1"


def test_the_host_id_comes_from_the_machine_id_without_showing_it(machine_id_file: Path) -> None:
    found = host_id(machine_id_file=machine_id_file)
    assert found == host_id(machine_id_file=machine_id_file) == "faf3c4063ce35747142402205eb2aaa1"
    assert MACHINE_ID not in found
    machine_id_file.write_text(MACHINE_ID[::-1])
    assert host_id(machine_id_file=machine_id_file) != found


@pytest.mark.parametrize("content", [None, b"", b"uninitialized\n", b"\xff\xfe"])
def test_without_a_machine_id_the_host_id_comes_from_the_name(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "machine-id"
    if content is not None:
        path.write_bytes(content)
    found = host_id(machine_id_file=path)
    assert found == host_id(machine_id_file=tmp_path / "other")
    monkeypatch.setattr(socket, "gethostname", lambda: "another-host")
    assert host_id(machine_id_file=path) != found


def test_a_first_run_starts_at_the_time() -> None:
    assert generation_range(0, now_nanoseconds=1_000) == range(1_000, 1_000 + GENERATIONS_PER_RUN)


@given(times=st.lists(st.integers(0, 2**62) | st.just(1_700_000_000 * 10**9), min_size=2, max_size=10))
def test_generations_never_repeat_whatever_the_clock_does(times: list[int]) -> None:
    mark = 0
    for now in times:
        generations = generation_range(mark, now_nanoseconds=now)
        assert generations.start >= max(mark, 1)
        assert len(generations) == GENERATIONS_PER_RUN
        assert generations.stop <= 2**64
        mark = generations.stop


def test_a_mark_of_nonsense_does_not_leave_a_broker_without_generations() -> None:
    generations = generation_range(2**64 - 1, now_nanoseconds=1_000)
    assert generations.start == 1_000
