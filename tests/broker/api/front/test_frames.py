"""What a process may send over the gRPC socket is counted in HTTP/2 frames, however they are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weight_brokerd.api.front import allowances as module
from weight_brokerd.api.front.allowances import Allowances
from weight_brokerd.api.front.frames import FrameCounter
from weight_brokerd.core.conduct.pace import Pace
from weight_brokerd.core.model import Process

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FLOOD, HONEST = Process(1, "1"), Process(1, "2")


def frame(size: int, kind: int = 6) -> bytes:
    return size.to_bytes(3, "big") + bytes([kind, 0, 0, 0, 0, 0]) + bytes(size)


def counted(counter: FrameCounter, content: bytes) -> int:
    return counter.count(memoryview(content))


@given(st.lists(st.integers(0, 300), max_size=30), st.data())
def test_frames_are_counted_once_wherever_the_bytes_are_cut(sizes: list[int], data: st.DataObject) -> None:
    wire = PREFACE + b"".join(frame(size) for size in sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=10)))
    counter = FrameCounter()
    parts = [wire[start:end] for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert sum(counted(counter, part) for part in parts) == len(sizes)


def test_a_flood_byte_by_byte_is_counted_too() -> None:
    counter = FrameCounter()
    assert sum(counted(counter, bytes([byte])) for byte in PREFACE + 3 * frame(8)) == 3


def test_a_large_frame_counts_as_much_as_a_small_one() -> None:
    counter = FrameCounter()
    assert counted(counter, PREFACE + frame(16 << 10, kind=0) + frame(0)) == 2


def allowances(monkeypatch: pytest.MonkeyPatch, now: list[float]) -> Allowances:
    monkeypatch.setattr(module, "FRAME_PACE", Pace(per_second=10, burst=20))
    return Allowances(lambda: now[0])


def test_all_connections_of_a_process_share_what_it_may_send_and_others_have_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    everyone = allowances(monkeypatch, now)
    one, other, honest = everyone.of(FLOOD), everyone.of(FLOOD), everyone.of(HONEST)
    one.spend(memoryview(PREFACE + 30 * frame(8)))
    assert one.wait() == other.wait() > 1
    assert honest.wait() == 0
    now[0] = 1.2
    assert one.wait() == 0


def test_reads_without_a_frame_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = allowances(monkeypatch, [0.0])
    connection = everyone.of(FLOOD)
    for byte in PREFACE:
        connection.spend(memoryview(bytes([byte])))
    assert connection.wait() > 0


def test_nothing_is_read_of_a_process_whose_calls_wait_in_great_number(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = allowances(monkeypatch, [0.0])
    everyone.overrun = lambda process: 0.5 if process == FLOOD else 0.0
    assert everyone.of(FLOOD).wait() == 0.5
    assert everyone.of(HONEST).wait() == 0
