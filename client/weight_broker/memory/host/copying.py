"""Copying and digesting bytes on all processors.

The work is cut into tasks of a few MiB that worker threads and the caller take from one queue. `ctypes` and xxhash let
go of the interpreter lock during the long part. The threads live for one operation, so nothing survives into a forked
child, and all of them have ended before an operation returns or raises.
"""

from __future__ import annotations

import _thread
import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from weight_broker.digest import DigestAlgorithm, block_function, combine, sampled_blocks
from weight_broker.memory.host.address_space import advise_huge_pages, buffer_at
from weight_broker.memory.host.streaming import DigestingCopy, streaming_copy
from weight_broker.memory.kind import DeadlinePassed

MAX_THREADS = 16
TASK_BYTES = 4 << 20
"""Copied between two looks at the clock."""
SMALL_BYTES = 32 << 10
"""Pieces up to this size are copied in batches without letting go of the interpreter lock: handing it over costs more
than the copy."""
BATCH_PIECES = 256
HUGE_PAGE_ADVICE_BYTES = 4 << 20
STREAMING_BYTES = 16 << 20
"""From this size on, all pieces together, copying goes past the caches, which could not hold the
copy for its readers anyway."""
_LOST_WAKE_SECONDS = 0.02

Piece = tuple[int, int, int]
"""Destination address, source address, size in bytes."""
Content = tuple[int, int]
"""Address and size in bytes."""
Task = Callable[[], object]

# Both are C's memmove; the second one keeps the interpreter lock.
_copy = ctypes.memmove
_copy_locked = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memmove", ctypes.PyDLL(None))
)


def thread_count() -> int:
    """Number of threads that an operation uses: the processors this process may run on."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def run(tasks: Iterable[Task], *, own_tasks: Sequence[Task] = (), deadline: float | None = None) -> None:
    """Run all tasks in parallel; the caller's thread does `own_tasks` first and then helps with the others.

    `deadline` is a time of `time.monotonic`; `DeadlinePassed` if it comes before the last task has begun. Any error of
    a task stops the others after the tasks they are at, and is raised once all of them have.
    """
    waiting = deque(tasks)
    errors: list[BaseException] = []

    def work(queue: deque[Task]) -> None:
        try:
            while not errors:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeadlinePassed
                task()
        except BaseException as error:  # noqa: BLE001  # the caller's thread raises it below
            errors.append(error)

    helpers = _Helpers(partial(work, waiting))
    try:
        try:
            helpers.start(min(thread_count() - 1, len(waiting) - (not own_tasks)))
            work(deque(own_tasks))
            work(waiting)
        except BaseException as error:  # noqa: BLE001  # a signal's handler raised
            errors += [error]  # stops the helpers
        helpers.wait(errors)
    except BaseException as error:  # noqa: BLE001  # the next signal came right here
        errors += [error]
        helpers.wait(errors)
    if errors:
        raise next((error for error in errors if not isinstance(error, Exception)), errors[0])


class _Helpers:
    """Worker threads, and the certainty that all have ended.

    Not `threading.Thread`: when a signal's handler raises in `join`, CPython before 3.13 takes a thread that still runs
    for one that has ended, and when it raises in `start`, the thread may wait for ever.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._begun: list[None] = []
        self._ended: list[None] = []
        self._at_work: list[_thread.LockType] = []

    def start(self, count: int) -> None:
        """Start `count` threads, or fewer if the system allows no more."""
        for _ in range(count):
            at_work = _thread.allocate_lock()
            at_work.acquire()
            try:
                _thread.start_new_thread(self._run, (at_work,))
            except RuntimeError:  # the system allows no more threads: the caller's thread does the rest
                return
            self._at_work.append(at_work)

    def wait(self, errors: list[BaseException]) -> None:
        """Return when no thread works any more, also when signals arrive; errors of their handlers go to `errors`.

        A thread that begins only now does nothing: there is either no task left or an error.
        """
        while True:
            # Twice, since a signal may find this thread in the handler of the one before. There are no calls in the
            # handlers: signals are looked at after calls.
            try:
                try:
                    while len(self._ended) < len(self._begun):
                        for at_work in self._at_work:
                            at_work.acquire(timeout=_LOST_WAKE_SECONDS)
                    return
                except BaseException as error:  # noqa: BLE001
                    errors += [error]
            except BaseException as error:  # noqa: BLE001
                errors += [error]

    def _run(self, at_work: _thread.LockType) -> None:
        self._begun.append(None)
        try:
            self._work()
        finally:
            self._ended.append(None)
            at_work.release()


def copy(pieces: Sequence[Piece], *, own_tasks: Sequence[Task] = (), deadline: float | None = None) -> None:
    """Copy every piece."""
    run(_copy_tasks(pieces, None, TASK_BYTES, []), own_tasks=own_tasks, deadline=deadline)


def copy_and_digest(
    pieces: Sequence[Piece],
    algorithm: DigestAlgorithm,
    block_bytes: int,
    *,
    own_tasks: Sequence[Task] = (),
    deadline: float | None = None,
) -> list[int]:
    """Copy every piece and return the full digest of each.

    The bytes are digested on the way, while the processor's cache holds them, not in a second pass.
    """
    blocks = [[0] * -(-size // block_bytes) for _, _, size in pieces]
    run(_copy_tasks(pieces, algorithm, block_bytes, blocks), own_tasks=own_tasks, deadline=deadline)
    return [combine(algorithm, found) if found else 0 for found in blocks]


def digest_all(
    contents: Sequence[Content], algorithm: DigestAlgorithm, block_bytes: int, *, deadline: float | None = None
) -> list[int]:
    """The full digest of each content; 0 for an empty one."""
    found = [0] * len(contents)

    def digest(index: int) -> None:
        found[index] = digest_full(*contents[index], algorithm, block_bytes)

    run([partial(digest, index) for index in range(len(contents))], deadline=deadline)
    return found


def digest_full(address: int, size_bytes: int, algorithm: DigestAlgorithm, block_bytes: int) -> int:
    """The full digest of a tensor's content; 0 if there is none."""
    blocks = digest_blocks(address, size_bytes, algorithm, block_bytes)
    return combine(algorithm, blocks) if blocks else 0


def digest_blocks(address: int, size_bytes: int, algorithm: DigestAlgorithm, block_bytes: int) -> list[int]:
    """The digest of each block of a content."""
    function = block_function(algorithm)
    return [
        function(buffer_at(address + offset, min(block_bytes, size_bytes - offset)))
        for offset in range(0, size_bytes, block_bytes)
    ]


def digest_samples(
    contents: Iterable[Content],
    algorithm: DigestAlgorithm,
    block_bytes: int,
    *,
    deadline: float | None = None,
) -> list[int]:
    """The sampled digest of each content; 0 for an empty one."""
    # Not in threads: blocks of a sample are too short for the functions to let go of the interpreter lock.
    function = block_function(algorithm)
    digests: list[int] = []
    for address, size_bytes in contents:
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlinePassed
        blocks = [
            function(buffer_at(address + offset, length)) for offset, length in sampled_blocks(size_bytes, block_bytes)
        ]
        digests.append(combine(algorithm, blocks) if blocks else 0)
    return digests


def _copy_tasks(
    pieces: Sequence[Piece],
    algorithm: DigestAlgorithm | None,
    block_bytes: int,
    blocks: Sequence[list[int]],
) -> Iterator[Task]:
    """Tasks that copy the pieces and, with an algorithm, leave the digest of each block in `blocks[piece][block]`."""
    small = (index for index, piece in enumerate(pieces) if 0 < piece[2] <= SMALL_BYTES)
    while batch := list(islice(small, BATCH_PIECES)):
        yield partial(_copy_batch, pieces, batch, algorithm, block_bytes, blocks)
    copy, copy_and_digest = functions_for(sum(size for _, _, size in pieces), algorithm)
    step = max(block_bytes, TASK_BYTES // block_bytes * block_bytes)
    for index, (destination, source, size) in enumerate(pieces):
        if size <= SMALL_BYTES:
            continue
        for start in range(0, size, step):
            stop = min(size, start + step)
            advised = size if start == 0 and size >= HUGE_PAGE_ADVICE_BYTES else 0
            if algorithm is None:
                yield partial(_copy_range, copy, destination, source, start, stop, advised)
            else:
                into = blocks[index]
                yield partial(
                    _copy_blocks, copy_and_digest, destination, source, start, stop, advised, block_bytes, into
                )


def functions_for(size_bytes: int, algorithm: DigestAlgorithm | None) -> tuple[Callable[..., object], DigestingCopy]:
    """How to copy a range, and how to copy and digest one, when this much is copied in all."""
    streaming = streaming_copy() if size_bytes >= STREAMING_BYTES else None
    if streaming is None:
        return _copy, partial(_copy_then_digest, algorithm)
    if algorithm is DigestAlgorithm.XXH3_64 and streaming.copy_and_digest is not None:
        return streaming.copy, streaming.copy_and_digest
    return streaming.copy, partial(_copy_then_digest, algorithm)


def _copy_then_digest(
    algorithm: DigestAlgorithm | None, destination: int, source: int, size_bytes: int, block_bytes: int
) -> list[int]:
    """Copies and returns the digest of each block, with functions that every installation has."""
    function = block_function(algorithm or DigestAlgorithm.CRC32)
    digests: list[int] = []
    for offset in range(0, size_bytes, block_bytes):
        size = min(block_bytes, size_bytes - offset)
        _copy(destination + offset, source + offset, size)
        digests.append(function(buffer_at(destination + offset, size)))
    return digests


def _copy_range(
    copy: Callable[..., object], destination: int, source: int, start: int, stop: int, advised: int
) -> None:
    if advised:
        advise_huge_pages(destination, advised)
    copy(destination + start, source + start, stop - start)


def _copy_blocks(
    copy_and_digest: DigestingCopy,
    destination: int,
    source: int,
    start: int,
    stop: int,
    advised: int,
    block_bytes: int,
    blocks: list[int],
) -> None:
    if advised:
        advise_huge_pages(destination, advised)
    found = copy_and_digest(destination + start, source + start, stop - start, block_bytes)
    first = start // block_bytes
    blocks[first : first + len(found)] = found


def _copy_batch(
    pieces: Sequence[Piece],
    batch: Iterable[int],
    algorithm: DigestAlgorithm | None,
    block_bytes: int,
    blocks: Sequence[list[int]],
) -> None:
    for index in batch:
        destination, source, size = pieces[index]
        _copy_locked(destination, source, size)
        if algorithm is not None:
            function = block_function(algorithm)
            for offset in range(0, size, block_bytes):
                blocks[index][offset // block_bytes] = function(
                    buffer_at(destination + offset, min(block_bytes, size - offset))
                )
