"""Copying in parallel: every byte, the digest of what was written, and nobody left writing when it ends."""

from __future__ import annotations

import _thread
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from types import FrameType, SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.compiled_copy import compiled_copy
from support.held_memory import copying_threads
from weight_broker.digest import DigestAlgorithm, block_function, combine
from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import address_of
from weight_broker.memory.host.copying import SMALL_BYTES, TASK_BYTES
from weight_broker.memory.kind import DeadlinePassed

GUARD = 64
BLOCK = 512 << 10


@pytest.fixture(autouse=True, params=["streaming", "plain"])
def four_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several threads whatever the machine, and none of them left afterwards; with the compiled functions, whatever the
    size, and without."""
    monkeypatch.setattr(copying, "thread_count", lambda: 4)
    if request.param == "streaming":
        compiled_copy()
        monkeypatch.setattr(copying, "STREAMING_BYTES", 0)
    else:
        monkeypatch.setattr(copying, "streaming_copy", lambda: None)
    yield
    assert copying_threads() == 0


def reference_digest(content: bytes, algorithm: DigestAlgorithm, block_bytes: int) -> int:
    function = block_function(algorithm)
    blocks = [function(content[offset : offset + block_bytes]) for offset in range(0, len(content), block_bytes)]
    return combine(algorithm, blocks) if blocks else 0


class Memory:
    """A source of random bytes and a destination, each piece with a guard before and after it."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.source = bytearray(random.Random(7).randbytes(sum(sizes) + GUARD))
        self.destination = bytearray(b"\xaa" * (sum(sizes) + GUARD * (len(sizes) + 1)))
        self.pieces: list[copying.Piece] = []
        self._expected = bytearray(self.destination)
        self.contents: list[bytes] = []
        read, write = 3, GUARD
        for size in sizes:
            self.pieces.append((address_of(self.destination) + write, address_of(self.source) + read, size))
            self.contents.append(bytes(self.source[read : read + size]))
            self._expected[write : write + size] = self.contents[-1]
            read, write = read + size, write + size + GUARD

    def is_copied_exactly(self) -> bool:
        return self.destination == self._expected


SIZES = st.lists(
    st.one_of(st.integers(0, 300), st.sampled_from([SMALL_BYTES, SMALL_BYTES + 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])),
    max_size=12,
)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from(DigestAlgorithm), st.sampled_from([512, 4096, BLOCK]))
def test_every_byte_arrives_and_the_digests_are_those_of_what_was_written(
    sizes: list[int], algorithm: DigestAlgorithm, block_bytes: int
) -> None:
    memory = Memory(sizes)
    found = copying.copy_and_digest(memory.pieces, algorithm, block_bytes)
    assert memory.is_copied_exactly()
    assert found == [reference_digest(content, algorithm, block_bytes) for content in memory.contents]
    assert found == [copying.digest_full(to, size, algorithm, block_bytes) for to, _, size in memory.pieces]


@settings(max_examples=20, deadline=None)
@given(SIZES)
def test_every_byte_arrives_without_digests_too(sizes: list[int]) -> None:
    memory = Memory(sizes)
    copying.copy(memory.pieces)
    assert memory.is_copied_exactly()


@pytest.mark.parametrize("block_bytes", [BLOCK, TASK_BYTES, 3 << 20, 16 << 20])
def test_a_piece_of_several_tasks_is_digested_as_one(block_bytes: int) -> None:
    memory = Memory([2 * TASK_BYTES + 12345, 10, TASK_BYTES])
    found = copying.copy_and_digest(memory.pieces, DigestAlgorithm.XXH3_64, block_bytes)
    assert memory.is_copied_exactly()
    assert found == [reference_digest(content, DigestAlgorithm.XXH3_64, block_bytes) for content in memory.contents]


def test_more_pieces_than_a_batch_holds_all_arrive() -> None:
    memory = Memory([index % 40 for index in range(3 * copying.BATCH_PIECES + 1)])
    found = copying.copy_and_digest(memory.pieces, DigestAlgorithm.XXH3_64, BLOCK)
    assert memory.is_copied_exactly()
    assert found == [reference_digest(content, DigestAlgorithm.XXH3_64, BLOCK) for content in memory.contents]


def test_a_sampled_digest_sees_the_ends_and_not_what_lies_between_its_blocks() -> None:
    content = bytearray(random.Random(7).randbytes(1 << 20))

    def digest() -> list[int]:
        return copying.digest_samples([(address_of(content), len(content)), (0, 0)], DigestAlgorithm.CRC32, 4096)

    before = digest()
    assert before[1] == 0
    for position, seen in ((0, True), (4095, True), (4096, False), (len(content) - 1, True)):
        content[position] ^= 1
        assert (digest() != before) is seen
        content[position] ^= 1


def test_every_task_runs_once_and_own_tasks_on_the_callers_thread() -> None:
    done: list[tuple[int, int]] = []
    all_at_work = threading.Barrier(4)

    def task(number: int) -> None:
        if number < 4:
            all_at_work.wait(timeout=60)
        done.append((number, threading.get_ident()))

    copying.run([partial(task, number) for number in range(40)], own_tasks=[partial(task, 100), partial(task, 101)])
    assert sorted(number for number, _ in done) == [*range(40), 100, 101]
    assert {thread for number, thread in done if number >= 100} == {threading.get_ident()}
    assert len({thread for _, thread in done}) == 4


@pytest.mark.parametrize("failing", ["helper", "caller"])
def test_an_error_in_any_thread_stops_the_others_and_is_raised_when_they_have_ended(failing: str) -> None:
    running = threading.Barrier(4)
    ended: list[int] = []
    caller = threading.get_ident()
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        running.wait(timeout=60)
        if (threading.get_ident() == caller) == (failing == "caller") and not ended:
            ended.append(number)
            raise LookupError(failing)
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(LookupError, match=failing):
        copying.run([partial(task, number) for number in range(400)])
    assert sorted(ended) == sorted(begun)
    assert len(begun) == 4


def test_a_deadline_is_seen_between_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(copying, "time", SimpleNamespace(monotonic=lambda: float(len(done))))
    with pytest.raises(DeadlinePassed):
        copying.run([partial(done.append, number) for number in range(1000)], deadline=10.0)
    assert 10 <= len(done) < 10 + copying.thread_count(), "each thread may have been at one"


def test_work_that_ends_in_time_is_not_disturbed_by_its_deadline() -> None:
    done: list[int] = []
    copying.run([partial(done.append, number) for number in range(10)], deadline=time.monotonic() + 60)
    assert sorted(done) == list(range(10))


def test_sampling_stops_at_its_deadline() -> None:
    with pytest.raises(DeadlinePassed):
        copying.digest_samples([(0, 0)], DigestAlgorithm.CRC32, 4096, deadline=time.monotonic())


def test_the_caller_does_it_alone_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    memory = Memory([10, BLOCK, 5 * BLOCK, SMALL_BYTES + 1])
    copying.copy(memory.pieces)
    assert memory.is_copied_exactly()


def test_a_forked_child_can_copy_while_its_parent_does() -> None:
    memory = Memory([TASK_BYTES] * 4)
    stop = threading.Event()

    def copy_for_ever() -> None:
        while not stop.is_set():
            copying.copy(memory.pieces)

    parent = threading.Thread(target=copy_for_ever)
    parent.start()
    try:
        child = os.fork()
        if child == 0:
            own = Memory([TASK_BYTES] * 2)
            copying.copy(own.pieces)
            os._exit(0 if own.is_copied_exactly() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        parent.join()


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, TimeoutError])
@pytest.mark.parametrize("after", [0.0005, 0.002, 0.02, 0.04])
def test_whatever_a_signals_handler_raises_nobody_works_any_more_when_it_arrives(
    raised: type[BaseException], after: float
) -> None:
    at_work: set[int] = set()

    def task(number: int) -> None:
        at_work.add(number)
        deadline = time.monotonic() + (0.001 if number < 8 else 0.1)
        while time.monotonic() < deadline:
            time.sleep(0.01)
        at_work.discard(number)

    def handler(number: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not copying.run.__code__:
            frame = frame.f_back
        if frame is not None:  # not while the test itself handles what was raised
            raise raised

    before = signal.signal(signal.SIGALRM, handler)
    gc.disable()  # what a handler raises in a callback of the collector is lost
    try:
        # Again and again, because one that comes in a destructor or the callback of a weak reference is lost too.
        signal.setitimer(signal.ITIMER_REAL, after, 0.05)
        with pytest.raises(raised):
            copying.run([partial(task, number) for number in range(400)])
        left = {number for number in at_work if number >= 0}
        time.sleep(0.15)
        # A task of the caller's own thread was interrupted in the middle; those of helpers have ended, and none began.
        assert len(left) <= 1
        assert at_work == left
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()
