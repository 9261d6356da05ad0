"""What processes on an emulated Ascend host do with the real datasystem client. Called through `CardProcess`."""

from __future__ import annotations

import hashlib
import importlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from support import acl

Blobs = list[tuple[int, int]]
"""(address, size) of each, all on one device."""

_clients: dict[str, Any] = {}


class Outcome(NamedTuple):
    """How a call of the engine ended."""

    seconds: float
    failed_keys: list[str] | None
    """None: it raised."""
    error: str


def _module() -> Any:
    return importlib.import_module("yr.datasystem")  # only where the wheel is installed


def connect(name: str, port: int) -> None:
    """A HeteroClient of this process under a name."""
    client = _module().HeteroClient("127.0.0.1", port, connect_timeout_ms=10_000)
    client.init()
    _clients[name] = client


def disconnect(name: str) -> None:
    """Ends a client."""
    del _clients[name]


def allocate(device: int, sizes: list[int], seed: int | None = None) -> Blobs:
    """Fresh memory for each size, with the bytes of `seed` or zeros."""
    acl.set_device(device)
    blobs = [(acl.malloc(size), size) for size in sizes]
    fill(blobs, seed)
    return blobs


def fill(blobs: Blobs, seed: int | None) -> None:
    """Writes the bytes of `seed` or zeros."""
    for index, (address, size) in enumerate(blobs):
        if seed is None:
            acl.call("aclrtMemset", address, size, 0, size)
        else:
            acl.write(address, content(seed + index, size))


def content(seed: int, size: int) -> bytes:
    """Bytes with a prime period, so that what is shifted or swapped does not go unnoticed."""
    pattern = random.Random(seed).randbytes(min(size, 1_000_003))
    return (pattern * (size // len(pattern) + 1))[:size]


def digest(blobs: Blobs) -> str:
    """Of all bytes, in order."""
    state = hashlib.blake2b(digest_size=16)
    for address, size in blobs:
        state.update(acl.read(address, size))
    return state.hexdigest()


def call(name: str, method: str, *arguments: object) -> Outcome:
    """Calls a method of a client; whatever it raises is told in words."""
    begun = time.monotonic()
    try:
        failed = getattr(_clients[name], method)(*arguments)
    except RuntimeError as error:
        return Outcome(time.monotonic() - begun, None, " ".join(str(error).split()))
    return Outcome(time.monotonic() - begun, failed, "")


def _blob_list(device: int, blobs: Blobs) -> object:
    module = _module()
    return module.DeviceBlobList(device, [module.Blob(address, size) for address, size in blobs])


def publish(name: str, key: str, device: int, blobs: Blobs) -> Outcome:
    """dev_mset."""
    acl.set_device(device)
    return call(name, "dev_mset", [key], [_blob_list(device, blobs)])


def publish_in_a_fresh_thread(name: str, key: str, device: int, blobs: Blobs) -> Outcome:
    """dev_mset in a thread that has not set its device."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, name, "dev_mset", [key], [_blob_list(device, blobs)]).result()


def fetch(name: str, key: str, device: int, blobs: Blobs, wait_ms: int = 5000) -> Outcome:
    """dev_mget."""
    acl.set_device(device)
    return call(name, "dev_mget", [key], [_blob_list(device, blobs)], wait_ms)


def withdraw(name: str, key: str, device: int, seconds: float = 2.0) -> Outcome:
    """dev_local_delete, again while a reader's acknowledgement, which comes after its dev_mget, is on its way."""
    acl.set_device(device)
    deadline = time.monotonic() + seconds
    while True:
        outcome = call(name, "dev_local_delete", [key])
        if "Try again" not in outcome.error or time.monotonic() > deadline:
            return outcome
        time.sleep(0.02)


def store(name: str, key: str, device: int, blobs: Blobs) -> Outcome:
    """mset_d2h."""
    acl.set_device(device)
    return call(name, "mset_d2h", [key], [_blob_list(device, blobs)])


def load(name: str, key: str, device: int, blobs: Blobs) -> Outcome:
    """mget_h2d."""
    acl.set_device(device)
    return call(name, "mget_h2d", [key], [_blob_list(device, blobs)], 0)
