"""An instance whose tensors are on an emulated card: what it does with its broker. Called through `CardProcess`."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from support import acl, card_actions, datasystem_actions
from weight_broker import BrokerClient, BrokerError, WeightSetKey
from weight_broker.layout import ITEM_SIZES, MemoryFormat
from weight_broker.memory.device.tensor import DeviceTensor, Segment, SegmentKind
from weight_broker.memory.npu.registry import EXPORTS
from weight_broker.transfers.lease import ColdLoadLease
from weight_broker.transfers.publication import Publication

ALIGNMENT = 512


class Tensor(NamedTuple):
    """One tensor of a model. With `alias_of` it is that tensor under another name."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    padding: int = 0
    """Bytes that FRACTAL_NZ adds; the tensor is in that format if there are any."""
    alias_of: str = ""

    @property
    def size_bytes(self) -> int:
        """With the padding."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype] + self.padding


MIXED = [
    Tensor("a.weight", (1024, 1536)),
    Tensor("b.weight", (700, 333), "float16"),
    Tensor("c.bias", (77,), "float32"),
    Tensor("d.scale", ()),
    Tensor("e.empty", (0, 4)),
    Tensor("f.int8", (3, 5), "int8", padding=512 - 15),
    Tensor("g.tied", (1024, 1536), alias_of="a.weight"),
]
"""Sizes, types and formats of all sorts."""


class Outcome(NamedTuple):
    """How a call ended, for another process to look at."""

    error: str = ""
    """Name of the exception's class; empty if there was none."""
    message: str = ""
    touched: bool = False
    quiesced: bool = True
    source: str = ""
    """Name of the instance that the weights came from; "disk", or "lease" if this process is to load."""
    data_plane: str = ""
    path: str = ""
    phases: tuple[str, ...] = ()
    size_bytes: int = 0


@dataclass
class Model:
    """Memory and tensors on one card."""

    card: int
    base: int
    size: int
    tensors: dict[str, DeviceTensor]
    publication: Publication | None = None
    leases: list[ColdLoadLease] = field(default_factory=list)


_models: dict[str, Model] = {}
_kept: list[Model] = []
_clients: list[BrokerClient] = []


def client() -> BrokerClient:
    """This process's."""
    if not _clients:
        _clients.append(
            BrokerClient(
                name=os.environ.get("INSTANCE_NAME", ""),
                connect_timeout=20.0,
                digest_mode=os.environ.get("DIGEST_MODE", "auto"),
            )
        )
    return _clients[0]


def key_of(model: str) -> WeightSetKey:
    """The key under which a model is published here."""
    return WeightSetKey(model, revision="1")


def adopt(name: str, model: Model) -> None:
    """Memory and tensors that somebody else made."""
    _models[name] = model


def model_of(name: str) -> Model:
    """One that was created or adopted here."""
    return _models[name]


def create(
    model: str,
    card: int,
    tensors: Sequence[Tensor],
    seed: int | None = None,
    *,
    chunks: bool = False,
    sleeps: bool = False,
) -> None:
    """Gives the tensors memory, one after the other in one segment, with the bytes of `seed` or zeros. `sleeps`: it is
    of a pool that is taken away when the engine sleeps."""
    acl.set_device(card)
    offsets: dict[str, int] = {}
    end = ALIGNMENT  # the first is not at the beginning
    for one in tensors:
        if one.alias_of:
            offsets[one.name] = offsets[one.alias_of]
            continue
        offsets[one.name] = end
        end += -(-one.size_bytes // ALIGNMENT) * ALIGNMENT
    size = -(-end // acl.CHUNK) * acl.CHUNK
    if chunks:
        base, _ = card_actions.map_chunks(size // acl.CHUNK, card)
        segment = Segment(base, size, SegmentKind.VMM, acl.CHUNK, sleeps=sleeps)
    else:
        base = acl.malloc(size)
        segment = Segment(base, size, sleeps=sleeps)
    described = {one.name: _tensor(one, base + offsets[one.name], card, segment) for one in tensors}
    _models[model] = Model(card, base, size, described)
    write(model, seed)


def alias(model: str, name: str) -> None:
    """The same tensors as another model."""
    mine = _models[model]
    _models[name] = Model(mine.card, mine.base, mine.size, mine.tensors)


def create_again(model: str, tensors: Sequence[Tensor], *, sleeps: bool = False) -> None:
    """Other memory for the same model on the same card, with zeros; what is published stays so."""
    earlier = _models[model]
    _kept.append(earlier)
    create(model, earlier.card, tensors, None, sleeps=sleeps)


def write(model: str, seed: int | None) -> None:
    """Writes the bytes of `seed` or zeros into all of the model's memory."""
    mine = _models[model]
    acl.set_device(mine.card)
    datasystem_actions.fill([(mine.base, mine.size)], None)
    for index, name in enumerate(sorted(mine.tensors)):
        tensor = mine.tensors[name]
        if seed is not None and tensor.storage_bytes:
            datasystem_actions.fill([(tensor.address, tensor.storage_bytes)], seed + index)


def digest(model: str) -> str:
    """Of everything in the model's segment: what lies between the tensors too."""
    mine = _models[model]
    acl.set_device(mine.card)
    return hashlib.blake2b(acl.read(mine.base, mine.size), digest_size=16).hexdigest()


def publish(model: str, *, timeout: float = 60.0, in_host_memory: bool = False) -> Outcome:
    """Offers the model, with its lease if it has one."""
    mine = _models[model]
    lease = mine.leases.pop() if mine.leases else None
    try:
        mine.publication = client().publish(
            key_of(model), mine.tensors, lease=lease, timeout=timeout, in_host_memory=in_host_memory
        )
    except BrokerError as error:
        return _failed(error)
    return Outcome()


def retract(model: str, *, timeout: float = 60.0) -> Outcome:
    """Withdraws the model."""
    publication = _models[model].publication
    assert publication is not None
    try:
        publication.retract(timeout)
    except BrokerError as error:
        return _failed(error)
    _models[model].publication = None
    return Outcome()


def acquire(model: str, *, timeout: float = 60.0, wait: bool = True) -> Outcome:
    """Fills the model."""
    try:
        report = client().acquire(key_of(model), _models[model].tensors, timeout=timeout, wait=wait)
    except BrokerError as error:
        return _failed(error)
    return Outcome(
        source=report.source_instance_name,
        data_plane=report.data_plane,
        path=report.path,
        phases=tuple(sorted(report.phases)),
        size_bytes=report.size_bytes,
    )


def acquire_or_lease(model: str, *, timeout: float = 60.0) -> Outcome:
    """Fills the model, or takes the lease, which the next `publish` fulfils."""
    mine = _models[model]
    try:
        outcome = client().acquire_or_lease(key_of(model), mine.tensors, timeout=timeout)
    except BrokerError as error:
        return _failed(error)
    if isinstance(outcome, ColdLoadLease):
        mine.leases.append(outcome)
        return Outcome(source="lease", touched=outcome.touched)
    return Outcome(source=outcome.source_instance_name, data_plane=outcome.data_plane, path=outcome.path)


def acquire_or_load(model: str, seed: int, *, timeout: float = 60.0) -> Outcome:
    """Fills the model from a peer, or "from disk" with the bytes of `seed`; a source afterwards."""
    mine = _models[model]
    try:
        report = client().acquire_or_load(key_of(model), mine.tensors, lambda: write(model, seed), timeout=timeout)
    except BrokerError as error:
        return _failed(error)
    mine.publication = report.publication
    if report.report is None:
        return Outcome(source="disk", message=report.acquire_error or report.publish_error or "")
    return Outcome(
        source=report.report.source_instance_name, data_plane=report.report.data_plane, path=report.report.path
    )


def acquire_until_interrupted(model: str, seed: int) -> str:
    """Fills the model until Ctrl-C, then uses its memory for something else: the digest of that."""
    try:
        client().acquire(key_of(model), _models[model].tensors, timeout=60.0)
    except KeyboardInterrupt:
        write(model, seed)
        return digest(model)
    raise AssertionError("nobody interrupted it")


def is_published(model: str) -> bool:
    """Whether it is offered now, as far as this process knows."""
    publication = _models[model].publication
    return publication is not None and not publication.is_retracted


def exports() -> int:
    """Allocations and chunks that this process shares now."""
    return len(EXPORTS)


def stage_threads() -> int:
    """Threads that serve what is staged."""
    return sum(1 for thread in threading.enumerate() if thread.name == "weight-broker-stage")


def free(model: str) -> None:
    """Frees the model's memory; the driver refuses if somebody has it mapped."""
    mine = _models.pop(model)
    acl.set_device(mine.card)
    acl.free(mine.base)


def close() -> None:
    """Leaves the broker."""
    while _clients:
        _clients.pop().close()


def _tensor(one: Tensor, address: int, card: int, segment: Segment) -> DeviceTensor:
    stride: list[int] = []
    count = 1
    for size in reversed(one.shape):
        stride.insert(0, count)
        count *= size
    memory_format = MemoryFormat.FRACTAL_NZ if one.padding else MemoryFormat.STRIDED
    return DeviceTensor(
        address if one.size_bytes else 0,
        one.dtype,
        one.shape,
        tuple(stride),
        one.size_bytes,
        card,
        memory_format,
        segment=segment,
    )


def _failed(error: BrokerError) -> Outcome:
    return Outcome(type(error).__name__, error.message, error.touched, error.quiesced)
