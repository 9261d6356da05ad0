"""In a process that owns a GPU: what it asks of NVIDIA's driver, and how it starts.

It opens memory of any GPU of the host, each allocation in the context of the GPU that it is on, and copies with the
copy engines of its own GPU: directly where the driver can (peer access), else the driver goes through host memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from weight_broker.drivers import cuda
from weight_broker.drivers.cuda import Cuda, CudaError
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.copying import CopyingWork
from weight_brokerd.cards.child.memory import CardMemory, NotPossible, Span
from weight_brokerd.cards.child.separation import why_not_opened
from weight_brokerd.cards.messages import ImportRegion, Role
from weight_brokerd.cards.probe import Device


class CudaDriver:
    """See `weight_brokerd.cards.child.memory.DeviceDriver`."""

    def __init__(self, driver: Cuda, device: int) -> None:
        self._cuda = driver
        self._device = device
        self._lock = threading.Lock()
        self._indexes = {driver.device_id(index): index for index in range(driver.device_count())}
        self._contexts: dict[int, int] = {}
        self.use()

    def use(self) -> None:
        """Makes the GPU the calling thread's device."""
        self._cuda.set_current(self._context(self._device))

    def map(self, region: ImportRegion, undo: ExitStack) -> int:
        """Opens an allocation by its handle."""
        device = self._indexes.get(region.device_id)
        if device is None or not region.ipc_handle:
            known = ", ".join(self._indexes)
            raise NotPossible(f"the region is on {region.device_id or 'no GPU'}; this process sees {known}")
        context = self._context(device)
        address = self._open(context, region)
        undo.callback(self._close, context, address)
        try:
            _, size = self._cuda.allocation_of(address)
        except CudaError:  # the driver need not answer for opened memory
            return address
        if size < region.size_bytes:
            undo.close()
            raise NotPossible(f"region {region.region_id!r} has {size} bytes, not {region.size_bytes}")
        return address

    def copy(self, pairs: Sequence[tuple[Span, Span]]) -> None:
        """Between any two mapped GPUs; waits once, for all of it."""
        stream = self._cuda.create_stream()
        try:
            for (destination, size), (source, _) in pairs:
                self._cuda.copy_async(destination, source, size, stream)
        finally:
            self._cuda.synchronize_stream(stream)
        self._cuda.destroy_stream(stream)

    def malloc(self, size: int) -> int:
        """Fresh bytes on the GPU."""
        return self._cuda.malloc(size)

    def free(self, address: int) -> None:
        """Of `malloc`."""
        self._cuda.free(address)

    def _open(self, context: int, region: ImportRegion) -> int:
        try:
            with self._cuda.in_context(context):
                return self._cuda.ipc_open(bytes.fromhex(region.ipc_handle))
        except CudaError as error:
            if why := why_not_opened(region, error.code):
                raise NotPossible(f"{error}. {why}") from error
            raise

    def _close(self, context: int, address: int) -> None:
        with self._cuda.in_context(context):
            self._cuda.ipc_close(address)

    def _context(self, device: int) -> int:
        """The primary context of a GPU, kept for as long as this process lives. That of a peer is opened when memory of
        it is mapped first."""
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                context = self._contexts[device] = self._cuda.retain_primary_context(device)
                if device != self._device and self._cuda.can_access_peer(self._device, device):
                    with self._cuda.in_context(self._contexts[self._device]):
                        self._cuda.enable_peer_access(context)
            return context


class CudaCard:
    """See `weight_brokerd.cards.child.main.Card`."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._driver: CudaDriver | None = None

    def use(self) -> None:
        """Makes the GPU the calling thread's device."""
        assert self._driver is not None
        self._driver.use()

    def start(self, start: messages.Start) -> tuple[CopyingWork, messages.Ready]:
        """Opens the GPU; there is nothing to connect to."""
        at = time.monotonic()
        driver = cuda.load()
        self._driver = CudaDriver(driver, self._device)
        identity, name = driver.device_id(self._device), driver.device_name(self._device)
        ready = messages.Ready(os.getpid(), identity, name, {"open": time.monotonic() - at})
        return CopyingWork(CardMemory(self._driver)), ready


def open_card(role: Role, device: int) -> CudaCard:
    """For `weight_brokerd.cards.child.main`; every process of a GPU does the same."""
    return CudaCard(device)


def find_devices() -> Iterator[Device]:
    """Without opening them: a context takes hundreds of megabytes of the GPU and half a second."""
    driver = cuda.load()
    for index in range(driver.device_count()):
        yield Device(index, driver.device_id(index), driver.device_name(index))
