"""What instances do when a test tells them to."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from weight_broker import AcquireReport, BrokerClient, ColdLoadLease, WeightSetKey
from weight_broker.transfers.publication import Publication

Arrays = dict[str, npt.NDArray[Any]]


class State:
    """What an instance process remembers between two actions."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = BrokerClient(name=name)
        self.arrays: Arrays = {}
        self.attached: Mapping[str, object] = {}
        self.publications: list[Publication] = []
        self.lease: ColdLoadLease | None = None
        self.load_count = 0


def content(seed: int, count: int, size_bytes: int) -> Arrays:
    """`count` arrays of `size_bytes` each whose bytes follow from `seed`."""
    generator = np.random.default_rng(seed)
    return {
        f"layers.{index}.weight": generator.integers(0, 256, size_bytes, dtype=np.uint8).view(np.float16)
        for index in range(count)
    }


def checksum(arrays: Mapping[str, object]) -> str:
    """Digest of names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return digest.hexdigest()


def expected(seed: int, count: int = 4, size_bytes: int = 1 << 20) -> str:
    """The checksum of `content`."""
    return checksum(content(seed, count, size_bytes))


def current(state: State, /) -> str:
    """The checksum of the instance's arrays."""
    return checksum(state.arrays)


def current_attached(state: State, /) -> str:
    """The checksum of the attached tensors."""
    return checksum(state.attached)


def prepare(state: State, /, seed: int = 0, count: int = 4, size_bytes: int = 1 << 20) -> None:
    """Makes arrays; with seed 0 they are zero."""
    state.arrays = content(seed, count, size_bytes)
    if not seed:
        for array in state.arrays.values():
            array.view(np.uint8).fill(0)


def publish(state: State, /, model: str, seed: int, count: int = 4, size_bytes: int = 1 << 20, **key: Any) -> str:
    """Publishes arrays made from `seed`; returns the publication's id."""
    prepare(state, seed, count, size_bytes)
    return publish_current(state, model, **key)


def publish_current(state: State, /, model: str, **key: Any) -> str:
    """Publishes the arrays as they are."""
    state.publications.append(state.client.publish(WeightSetKey(model, **key), state.arrays))
    return state.publications[-1].id


def publication_ids(state: State, /) -> list[str]:
    """Ids of the publications as the client knows them now."""
    return [publication.id for publication in state.publications]


def retract_all(state: State, /, timeout: float = 30.0) -> None:
    """Retracts everything."""
    while state.publications:
        state.publications.pop().retract(timeout=timeout)


def acquire(state: State, /, model: str, *, wait: bool = True, timeout: float = 60.0, **key: Any) -> AcquireReport:
    """Fills the arrays."""
    return state.client.acquire(WeightSetKey(model, **key), state.arrays, wait=wait, timeout=timeout)


def acquire_or_load(
    state: State, model: str, seed: int, *, load_until: str = "", timeout: float = 120.0, fail: bool = False
) -> tuple[str, str, int]:
    """Fills the arrays from a peer or from `content`; returns source, checksum and how often it loaded. Loading does
    not end before the file `load_until` exists."""

    def load() -> None:
        state.load_count += 1
        while load_until and not os.path.exists(load_until):
            time.sleep(0.01)
        if fail:
            raise OSError("the disk is gone")
        fresh = content(seed, len(state.arrays), next(iter(state.arrays.values())).nbytes)
        for name, array in state.arrays.items():
            array[:] = fresh[name]

    report = state.client.acquire_or_load(WeightSetKey(model), state.arrays, load, timeout=timeout)
    if report.publication is not None:
        state.publications.append(report.publication)
    return report.source, current(state), state.load_count


def attach_tensors(state: State, /, model: str, *, timeout: float = 60.0) -> AcquireReport:
    """Attaches without a copy."""
    attached = state.client.attach_tensors(WeightSetKey(model), framework="numpy", timeout=timeout)
    state.attached = attached
    return attached.report


def write_attached(state: State, /) -> None:
    """Writes to every attached array."""
    for array in state.attached.values():
        assert isinstance(array, np.ndarray)
        array.view(np.uint8).fill(7)


def take_lease(state: State, /, model: str, timeout: float = 60.0) -> int:
    """Asks for the weights or the lease; returns the fencing token, 0 if filled."""
    outcome = state.client.acquire_or_lease(WeightSetKey(model), state.arrays, timeout=timeout)
    if isinstance(outcome, ColdLoadLease):
        state.lease = outcome
        return outcome.fencing_token
    return 0


def give_up_lease(state: State, /) -> None:
    """Gives the lease up."""
    assert state.lease is not None
    state.lease.give_up("test")


def close(state: State, /) -> None:
    """Closes the client."""
    state.client.close()


def sleep(state: State, /, seconds: float) -> None:
    """Does nothing for a while, as an instance that serves."""
    time.sleep(seconds)


def flip_before_sealing(state: State, /) -> None:
    """From now on this instance publishes memory in which one byte differs from what was digested."""
    from weight_broker.memory.host import export as host

    seal = host.seal

    def flip_and_seal(fd: int) -> None:
        position = os.fstat(fd).st_size // 2
        byte = os.pread(fd, 1, position)
        os.pwrite(fd, bytes([byte[0] ^ 1]), position)
        seal(fd)

    host.seal = flip_and_seal


def misread(state: State, /) -> None:
    """From now on what this instance reads is not what was published, as if its own memory were broken."""
    from weight_broker.memory.host import copying

    module: Any = copying
    combine = module.combine
    module.combine = lambda algorithm, blocks: combine(algorithm, blocks) ^ 1


def slow_copies(state: State, /, seconds: float) -> None:
    """From now on every 512 KiB that this instance copies take `seconds`."""
    _before_copying(lambda size: time.sleep(seconds * -(-size // (512 << 10))))


def fail_copies_after(state: State, /, ranges: int) -> None:
    """From now on copying fails after this many ranges."""
    lock = threading.Lock()
    left = ranges

    def fail_in_time(size: int) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left < 0:
                raise OSError("copy failed")

    _before_copying(fail_in_time)


def _before_copying(act: Callable[[int], None]) -> None:
    """Has `act` called with the size of each range before it is copied, whichever way that is done."""
    from weight_broker.memory.host import copying

    functions_for = copying.functions_for

    def acting(size_bytes: int, algorithm: Any) -> tuple[Any, Any]:
        def before(function: Callable[..., Any]) -> Callable[..., Any]:
            def acting_function(destination: int, source: int, size: int, *more: int) -> Any:
                act(size)
                return function(destination, source, size, *more)

            return acting_function

        copy, copy_and_digest = functions_for(size_bytes, algorithm)
        return before(copy), before(copy_and_digest)

    vars(copying)["functions_for"] = acting


def resources(state: State, /) -> dict[str, int]:
    """What the process holds: open descriptors and mappings of memfds, and threads."""
    with open("/proc/self/maps") as maps:
        mapped = sum(1 for line in maps if "/memfd:" in line)
    open_memfds = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            open_memfds += os.readlink(f"/proc/self/fd/{entry}").startswith("/memfd:")
        except FileNotFoundError:
            continue
    return {"mapped": mapped, "memfds": open_memfds}
