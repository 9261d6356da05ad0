"""A process that sends very large requests: `python -m benchmarks.large_loads RUNTIME_DIRECTORY LOAD`.

It prints `loading` once the first request has its answer, and goes on until it is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from benchmarks.flooder import Flooder, ask

from weight_broker.digest import ContentDigests, DigestAlgorithm, DigestCoverage
from weight_broker.key import WeightSetKey
from weight_broker.layout import MAX_TENSORS, Layout, TensorSpec
from weight_broker.v1 import attach_pb2 as attach
from weight_broker.v1 import inspection_service_pb2 as inspection
from weight_broker.v1 import resources_pb2, weight_set_pb2
from weight_broker.v1 import weight_broker_service_pb2 as service
from weight_broker.wire import digests_to_wire, key_to_wire, layout_to_wire

AT_ONCE = 4
"""Messages of 60 MB that the flooding process has under way."""
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_TENSOR_BYTES = 16
_PUBLISH = "/weight_broker.v1.WeightBrokerService/Publish"
_GET_HOST = "/weight_broker.v1.InspectionService/GetHost"
_UNKNOWN_FIELD = b"\x92\x3f\x80\x8e\xce\x1c" + bytes(60_000_000)
"""Number 1010, 60,000,000 bytes."""
_ACQUIRE = "/weight_broker.v1.WeightBrokerService/Acquire"


def publication(model: str, name_characters: int = 0) -> bytes:
    """A Publish request with as many tensors as there may be, each in its place. Each model has another layout."""
    layout = Layout(
        TensorSpec(
            f"model.layers.{number // 768}.mlp.experts.{number}.{model}".ljust(name_characters, "."),
            "float32",
            (4,),
            (1,),
            _TENSOR_BYTES,
        )
        for number in range(MAX_TENSORS)
    )
    digests = ContentDigests(DigestAlgorithm.CRC32, DigestCoverage.FULL, 4096, tuple(range(MAX_TENSORS)))
    region = weight_set_pb2.Region(
        region_id="large",
        device_kind=weight_set_pb2.DEVICE_KIND_CPU,
        size_bytes=MAX_TENSORS * _TENSOR_BYTES,
        host_memory=weight_set_pb2.HostMemory(),
    )
    return service.PublishRequest(
        key=key_to_wire(WeightSetKey(model)),
        layout=layout_to_wire(layout),
        digests=[digests_to_wire(digests)],
        regions=[region],
        placements=[
            weight_set_pb2.TensorPlacement(region_index=0, offset_bytes=_TENSOR_BYTES * number)
            for number in range(MAX_TENSORS)
        ],
        request_id=model,
    ).SerializeToString()


async def messages(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Publications of 60 MB without end, `AT_ONCE` at a time, of memory that was not handed over."""
    wires = [publication(f"flood-{number}", name_characters=260) for number in range(2)]
    metadata = flooder.metadata()
    publish = _raw(_channel(flooder).unary_unary, _PUBLISH)

    async def send(number: int) -> None:
        while True:
            try:
                await publish(wires[number % len(wires)], metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED):
                    raise
            ready()

    await asyncio.gather(*(send(number) for number in range(AT_ONCE)))


async def oversized(flooder: Flooder, ready: Callable[[], None]) -> None:
    """GetHost with 60 MB without end, which is refused."""
    await _oversized(flooder, flooder.metadata(), ready)


async def oversized_without_a_token(flooder: Flooder, ready: Callable[[], None]) -> None:
    """The same, by callers that have not attached."""
    await _oversized(flooder, (), ready)


async def _oversized(flooder: Flooder, metadata: Any, ready: Callable[[], None]) -> None:
    wire = inspection.GetHostRequest().SerializeToString() + _UNKNOWN_FIELD
    get_host = _raw(_channel(flooder).unary_unary, _GET_HOST)

    async def send() -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await get_host(wire, metadata=metadata)
            ready()

    await asyncio.gather(*(send() for _ in range(AT_ONCE)))


async def tensors(flooder: Flooder, ready: Callable[[], None]) -> None:
    """Acquisitions of 200,000 tensors without end, each with the whole layout in its request."""
    wire = publication("tensors")
    request = service.PublishRequest.FromString(wire)
    metadata = flooder.metadata()
    publish = _raw(_channel(flooder).unary_unary, _PUBLISH)
    acquire = _raw(_channel(flooder).unary_stream, _ACQUIRE)
    others = [publication(f"tensors-{number}") for number in range(2)]
    acquisition = service.AcquireRequest(
        key=request.key,
        layout=request.layout,
        if_absent=service.IF_ABSENT_FAIL,
        path=resources_pb2.TRANSFER_PATH_COPY,
        device_kind=weight_set_pb2.DEVICE_KIND_CPU,
        request_id="tensors",
    ).SerializeToString()
    _hand_over(flooder)
    await publish(wire, metadata=metadata)
    while True:
        call = acquire(acquisition, metadata=metadata)
        await call.read()
        call.cancel()
        ready()
        for other in others:
            try:
                await publish(other, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise


def _hand_over(flooder: Flooder) -> None:
    """Memory for a publication, sealed as the broker wants it."""
    size_bytes = MAX_TENSORS * _TENSOR_BYTES
    memory = os.memfd_create("large", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size_bytes)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
    offer = attach.OfferRegion(region_id="large", size_bytes=size_bytes)
    ask(flooder.kept[0], attach.AttachRequest(offer_region=offer), memory)
    os.close(memory)


def _channel(flooder: Flooder) -> grpc.aio.Channel:
    """One that takes answers of any size."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    return grpc.aio.insecure_channel(f"unix:{flooder.directory / 'broker.sock'}", options=options)


def _raw(kind: Any, method: str) -> Any:
    return kind(method, request_serializer=lambda request: request, response_deserializer=lambda response: response)


LOADS: dict[str, Callable[[Flooder, Callable[[], None]], Awaitable[None]]] = {
    "messages of 60 MB": messages,
    "60 MB to GetHost": oversized,
    "60 MB to GetHost without a token": oversized_without_a_token,
    "200,000 tensors": tensors,
}


def main() -> None:
    """Loads until it is killed."""
    said: list[None] = []

    def ready() -> None:
        if not said:
            said.append(None)
            print("loading", flush=True)

    async def run() -> None:
        await LOADS[sys.argv[2]](Flooder(Path(sys.argv[1])), ready)

    asyncio.run(run())


if __name__ == "__main__":
    main()
