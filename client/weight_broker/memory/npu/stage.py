"""Copying between tensors in the memory of an NPU and a bucket on the same card, in this process."""

from __future__ import annotations

import threading
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

from weight_broker.drivers import acl as acl_module
from weight_broker.drivers.acl import Acl, AclError, AclUnavailable, MemcpyKind
from weight_broker.errors import PublishRefused
from weight_broker.memory.device.describe import DescribedDeviceTensors

if TYPE_CHECKING:
    from weight_broker.v1 import weight_set_pb2 as pb


class Buckets:
    """What this process has imported, counted: an allocation can be imported once in a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[bytes, int, int, int]] = {}
        """Key, address, size and number of uses, by bucket."""

    def __len__(self) -> int:
        return len(self._open)

    def open(self, acl: Acl, bucket: pb.Region) -> None:
        """Imports it, on its device, or counts."""
        with self._lock:
            key, size = bucket.npu_allocation.export_key, bucket.size_bytes
            _, address, _, uses = self._open.get(bucket.region_id, (key, 0, size, 0))
            if not uses:
                address = acl.ipc_import(key)
            self._open[bucket.region_id] = key, address, size, uses + 1

    def close(self, acl: Acl, bucket_id: str) -> None:
        """The last use closes it. If the driver refuses, nothing has changed."""
        with self._lock:
            key, address, size, uses = self._open[bucket_id]
            if uses == 1:
                acl.ipc_close(key)
                del self._open[bucket_id]
            else:
                self._open[bucket_id] = key, address, size, uses - 1

    def address(self, bucket_id: str, offset: int, size: int) -> int:
        """Where a part of it is here. Raises ValueError if it has no such part."""
        with self._lock:
            _, address, bucket_bytes, _ = self._open.get(bucket_id, (b"", 0, -1, 0))
        if not 0 <= offset <= bucket_bytes - size:
            raise ValueError(f"{size} bytes at {offset} are not within a bucket that is open as {bucket_id!r}")
        return address + offset


BUCKETS = Buckets()
"""This process's."""


class NpuStagedTensors:
    """See `weight_broker.connection.stage_server.StagedTensors`. It keeps the tensors alive."""

    def __init__(self, described: DescribedDeviceTensors, *, acl: Acl | None = None) -> None:
        """Raises `PublishRefused` where there is no driver."""
        try:
            self._acl = acl or acl_module.load()
        except AclUnavailable as error:
            raise PublishRefused(f"device memory cannot be copied: {error}") from error
        self._described = described
        self._parts = [
            (tensor.address, tensor.spec.content_bytes) for tensor in described.tensors if tensor.spec.content_bytes
        ]
        self._ends = list(accumulate(size for _, size in self._parts))

    def synchronize(self) -> None:
        """Waits for whatever the caller does with the tensors. Raises `PublishRefused`."""
        if self._described.synchronize is not None:
            self._described.synchronize()
        try:
            with self._acl.on_device(self._described.device_index):
                self._acl.synchronize_device()
        except AclError as error:
            raise PublishRefused(f"the driver does not wait for the device: {error}") from error

    def open(self, bucket: pb.Region) -> None:
        """Imports it."""
        with self._acl.on_device(self._described.device_index):
            BUCKETS.open(self._acl, bucket)

    def close(self, bucket_id: str) -> None:
        """Ends the import if nobody else here needs it."""
        with self._acl.on_device(self._described.device_index):
            BUCKETS.close(self._acl, bucket_id)

    def copy(self, bucket_id: str, bucket_offset: int, content_offset: int, size: int, *, to_bucket: bool) -> None:
        """Copies within the card. Raises AclError, ValueError."""
        total = self._ends[-1] if self._ends else 0
        if not 0 <= content_offset <= total - size:
            raise ValueError(f"{size} bytes at {content_offset} are not within the content of {total} bytes")
        bucket = BUCKETS.address(bucket_id, bucket_offset, size)
        with self._acl.on_device(self._described.device_index):
            for address, length in self.spans(content_offset, size):
                pair = (bucket, address) if to_bucket else (address, bucket)
                self._acl.memcpy(pair[0], length, pair[1], length, MemcpyKind.DEVICE_TO_DEVICE)
                bucket += length

    def spans(self, at: int, size: int) -> list[tuple[int, int]]:
        """(address, bytes) of a part of the content, in order."""
        spans = []
        end = at + size
        index = bisect_right(self._ends, at)
        while at < end:
            address, length = self._parts[index]
            part_end = self._ends[index]
            taken = min(end, part_end) - at
            spans.append((address + length - (part_end - at), taken))
            at += taken
            index += 1
        return spans
