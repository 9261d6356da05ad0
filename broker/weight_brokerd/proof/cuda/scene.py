"""A row's view of NVIDIA's driver: processes, and short names for the calls that most rows make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from weight_broker.drivers.cuda import HANDLE_BYTES, IPC_LAZY_PEER_ACCESS, LIBRARY
from weight_brokerd.proof.processes import Answer, Argument, DriverProcess, NotRun, Scene

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 2 * MIB
"""Smaller allocations share a block of this size."""
PATTERN = "0123456789abcdef"
"""16 hexadecimal digits: 8 bytes."""
UUID_BYTES = 16
ANOTHER_USER = 65534
VISIBLE = "CUDA_VISIBLE_DEVICES"
NEW_PID_NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
NEW_IPC_NAMESPACE = ("unshare", "--ipc")
NEW_NAMESPACES = (*NEW_PID_NAMESPACE, "--ipc")

OUT_POINTER: Argument = ("out ptr", 0)
OUT_ADDRESS: Argument = ("out u64", 0)
OUT_SIZE: Argument = ("out size", 0)
OUT_I32: Argument = ("out i32", 0)
OUT_TEXT: Argument = ("out text", 0)
NULL: Argument = ("ptr", None)


def i32(value: int) -> Argument:
    """An int, a CUdevice or a CUresult."""
    return "i32", value


def u32(value: int) -> Argument:
    """An unsigned int."""
    return "u32", value


def address(value: int) -> Argument:
    """A CUdeviceptr."""
    return "u64", value


def size(value: int) -> Argument:
    """A size_t."""
    return "size", value


def pointer(value: int) -> Argument:
    """A context or a stream."""
    return "ptr", value


class CudaProcess(DriverProcess):
    """A process that calls NVIDIA's driver."""

    def open_device(self, index: int = 0) -> int:
        """Makes the device's primary context current; the context. Raises NotRun if there is no such device."""
        context = int(self.value("cuDevicePrimaryCtxRetain", OUT_POINTER, i32(self.device(index))))
        if self.code("cuCtxSetCurrent", pointer(context)):
            raise NotRun(f"the context of device {index} cannot be made current")
        return context

    def device(self, index: int = 0) -> int:
        """The CUdevice."""
        return int(self.value("cuDeviceGet", OUT_I32, i32(index)))

    def count(self) -> int:
        """How many devices the process sees."""
        return int(self.value("cuDeviceGetCount", OUT_I32))

    def uuid(self, index: int = 0) -> str:
        """Hexadecimal."""
        return str(self.value("cuDeviceGetUuid_v2", ("room", UUID_BYTES), i32(self.device(index))))

    def uuids(self) -> list[str]:
        """Of all devices, in the process's order."""
        return [self.uuid(index) for index in range(self.count())]

    def name(self, index: int = 0) -> str:
        """As people know the device."""
        room = str(self.value("cuDeviceGetName", ("room", 256), i32(256), i32(self.device(index))))
        return bytes.fromhex(room).split(b"\0")[0].decode(errors="replace")

    def attribute(self, number: int, index: int = 0) -> int:
        """A CUdevice_attribute."""
        return int(self.value("cuDeviceGetAttribute", OUT_I32, i32(number), i32(self.device(index))))

    def malloc(self, count: int) -> int:
        """The address of fresh bytes."""
        return int(self.value("cuMemAlloc_v2", OUT_ADDRESS, size(count)))

    def free(self, at: int) -> int:
        """The code of cuMemFree."""
        return self.code("cuMemFree_v2", address(at))

    def write(self, at: int, text: str = PATTERN) -> int:
        """The code of copying bytes, in hexadecimal, to the device."""
        return self.code("cuMemcpyHtoD_v2", address(at), ("bytes", text), size(len(text) // 2))

    def read(self, at: int, text: str = PATTERN) -> tuple[int, bool]:
        """The code, and whether these bytes are there."""
        count = len(text) // 2
        answer = self.call("cuMemcpyDtoH_v2", ("room", count), address(at), size(count))
        return answer.code, answer.value == text

    def copy(self, to: int, at: int, count: int) -> tuple[int, ...]:
        """The codes of a copy in a fresh stream, of waiting, and of destroying the stream."""
        stream = pointer(self.value("cuStreamCreate", OUT_POINTER, u32(1)))
        copied = self.code("cuMemcpyAsync", address(to), address(at), size(count), stream)
        return copied, self.code("cuStreamSynchronize", stream), self.code("cuStreamDestroy_v2", stream)

    def range_of(self, at: int) -> Answer:
        """Base and size of the allocation."""
        return self.call("cuMemGetAddressRange_v2", OUT_ADDRESS, OUT_SIZE, address(at))

    def handle(self, at: int) -> str:
        """Hexadecimal."""
        return str(self.value("cuIpcGetMemHandle", ("room", HANDLE_BYTES), address(at)))

    def open(self, handle: str, flags: int = IPC_LAZY_PEER_ACCESS) -> Answer:
        """The address of another process's memory."""
        return self.call("cuIpcOpenMemHandle_v2", OUT_ADDRESS, ("value", handle), u32(flags))

    def opened(self, handle: str) -> int:
        """The same. Raises NotRun if the driver refuses."""
        return int(self.value("cuIpcOpenMemHandle_v2", OUT_ADDRESS, ("value", handle), u32(IPC_LAZY_PEER_ACCESS)))

    def close(self, at: int) -> int:
        """The code of cuIpcCloseMemHandle."""
        return self.code("cuIpcCloseMemHandle", address(at))


class CudaScene(Scene):
    """The processes of one row."""

    def fresh(
        self, visible: str | None = None, *, prefix: Sequence[str] = (), user: int = -1, **variables: str
    ) -> CudaProcess:
        """A process that has made no call. `visible`: CUDA_VISIBLE_DEVICES, else that of this process."""
        if (prefix or user >= 0) and os.geteuid():
            raise NotRun("other users and namespaces need root")
        environment: Mapping[str, str] = {**self.environment, **variables}
        if visible is not None:
            environment = {**environment, VISIBLE: visible}
        process = CudaProcess([LIBRARY], environment, prefix=prefix, user=user)
        self.processes.append(process)
        return process

    def initialised(
        self, visible: str | None = None, *, prefix: Sequence[str] = (), user: int = -1, **variables: str
    ) -> CudaProcess:
        """A process that sees its devices. Raises NotRun if there is none."""
        process = self.fresh(visible, prefix=prefix, user=user, **variables)
        if code := process.code("cuInit", u32(0)):
            raise NotRun(f"cuInit failed with {code}")
        return process

    def process(self, device: int = 0, *, prefix: Sequence[str] = (), user: int = -1) -> CudaProcess:
        """A process on a device. Raises NotRun if there is no such device."""
        process = self.initialised(prefix=prefix, user=user)
        process.open_device(device)
        return process

    def two_devices(self) -> CudaProcess:
        """A process that sees two devices at least. Raises NotRun if there is one."""
        process = self.initialised()
        if process.count() < 2:
            raise NotRun("needs two GPUs")
        return process

    def shared(self, count: int = BLOCK) -> tuple[CudaProcess, str]:
        """An exporter, and the handle of memory that begins with `PATTERN`."""
        exporter = self.process()
        at = exporter.malloc(count)
        exporter.write(at)
        return exporter, exporter.handle(at)
