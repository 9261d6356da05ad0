"""The datasystem's client between two cards, with own memory and with memory of another process."""

from __future__ import annotations

import secrets
import statistics
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from weight_brokerd.ascend_check.contract.driver import MIB, Scene
from weight_brokerd.ascend_check.contract.machine.costs import large
from weight_brokerd.ascend_check.contract.machine.store_process import StoreProcess, worker
from weight_brokerd.ascend_check.contract.row import UNKNOWN, rows

ROWS, row = rows()
_DONE = "dev_mset and dev_mget of {}, 64 MiB and 1 GiB: bit-exact; seconds of the first; median of 10 more"
_EXPECTED = ((True, UNKNOWN, UNKNOWN), (True, UNKNOWN, UNKNOWN))
_SOURCE = "datasystem 0.8.1 P2P-Transfer: HcclSend of the address; H4"
_WARM = 10
_BLOBS = 4
_FETCH_MILLISECONDS = 30_000


def _moved(scene: Scene, *, chunks: bool | None) -> object:
    """`chunks`: None is the sender's own memory, else another process's."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="wb-")))
        host, port = stack.enter_context(worker(directory))
        owner, sender, receiver = (stack.enter_context(StoreProcess(scene, card, directory)) for card in (0, 0, 1))
        for process in (sender, receiver):
            process.connect(host, port)
        sizes = min(64 * MIB, large(scene)), large(scene)
        return tuple(_measured(owner, sender, receiver, size, chunks) for size in sizes)


def _measured(
    owner: StoreProcess, sender: StoreProcess, receiver: StoreProcess, size: int, chunks: bool | None
) -> tuple[bool, float, float]:
    name = secrets.token_hex(4)
    if chunks is None:
        sender.ask("allocate", name=name, size=size, blobs=_BLOBS)
    else:
        owner.ask("allocate", name=name, size=size, blobs=_BLOBS, chunks=chunks)
        sender.ask("import_", name=name, regions=owner.ask("export", name=name)["regions"], blobs=_BLOBS)
    receiver.ask("allocate", name=name, size=size, blobs=_BLOBS)
    first = _transfer(sender, receiver, name)
    exact = sender.ask("content", name=name)["digest"] == receiver.ask("content", name=name)["digest"]
    return exact, first, round(statistics.median(_transfer(sender, receiver, name) for _ in range(_WARM)), 4)


def _transfer(sender: StoreProcess, receiver: StoreProcess, name: str) -> float:
    key = f"proof-{secrets.token_hex(16)}"
    sender.ask("offer", name=name, key=key)
    seconds = float(receiver.ask("fetch", name=name, key=key, timeout_ms=_FETCH_MILLISECONDS)["seconds"])
    sender.ask("withdraw", key=key)
    return round(seconds, 4)


@row(
    "S1.own",
    "HcclSend",
    "HcclRecv",
    done=_DONE.format("own memory"),
    expected=_EXPECTED,
    source=_SOURCE,
    needed_by="the data plane datasystem",
)
def own(scene: Scene) -> object:
    return _moved(scene, chunks=None)


@row(
    "S1.key",
    "HcclSend",
    "HcclRecv",
    done=_DONE.format("memory imported by key"),
    expected=_EXPECTED,
    source=_SOURCE,
    needed_by="the direct path, plain allocations; cards.path",
)
def by_key(scene: Scene) -> object:
    return _moved(scene, chunks=False)


@row(
    "S1.chunks",
    "HcclSend",
    "HcclRecv",
    done=_DONE.format("memory imported as chunks"),
    expected=_EXPECTED,
    source=_SOURCE,
    needed_by="the direct path, expandable segments; cards.path",
)
def by_chunks(scene: Scene) -> object:
    return _moved(scene, chunks=True)
