"""NVIDIA's driver (libcuda) through ctypes: the calls that sharing device memory needs, each of them checked.

Methods are named after the driver's functions, addresses and handles are integers. The library is loaded when a `Cuda`
is made, never on import. Contexts are the devices' primary ones, which are those of torch and of the CUDA runtime.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from uuid import UUID

from weight_broker.drivers.error import DriverError

LIBRARY = "libcuda.so.1"
HANDLE_BYTES = 64
"""CU_IPC_HANDLE_SIZE"""
PEER_ACCESS_ALREADY_ENABLED = 704
"""CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"""

IPC_LAZY_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS"""
STREAM_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING"""
IS_IPC_CAPABLE = 10
"""CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE"""
_NAME_BYTES = 256
_PARTITIONED = " MIG "
"""In the name of an instance of a partitioned GPU: "NVIDIA A100-SXM4-40GB MIG 1g.5gb"."""


class IpcHandle(ctypes.Structure):
    """CUipcMemHandle; functions take it by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class _Uuid(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 16)]


_POINTER, _ADDRESS, _SIZE = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
_INT, _UINT = ctypes.c_int, ctypes.c_uint
ARGUMENTS: Mapping[str, Sequence[Any]] = {
    "cuInit": (_UINT,),
    "cuGetErrorName": (_INT, _POINTER),
    "cuGetErrorString": (_INT, _POINTER),
    "cuDeviceGetCount": (_POINTER,),
    "cuDeviceGet": (_POINTER, _INT),
    "cuDeviceGetName": (_POINTER, _INT, _INT),
    "cuDeviceGetUuid_v2": (_POINTER, _INT),
    "cuDeviceCanAccessPeer": (_POINTER, _INT, _INT),
    "cuDevicePrimaryCtxRetain": (_POINTER, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxSetCurrent": (_POINTER,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuCtxEnablePeerAccess": (_POINTER, _UINT),
    "cuCtxSynchronize": (),
    "cuMemAlloc_v2": (_POINTER, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemGetAddressRange_v2": (_POINTER, _POINTER, _ADDRESS),
    "cuPointerGetAttribute": (_POINTER, _INT, _ADDRESS),
    "cuIpcGetMemHandle": (_POINTER, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_POINTER, IpcHandle, _UINT),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _POINTER),
    "cuMemcpyDtoH_v2": (_POINTER, _ADDRESS, _SIZE),
    "cuMemcpyHtoD_v2": (_ADDRESS, _POINTER, _SIZE),
    "cuStreamCreate": (_POINTER, _UINT),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamDestroy_v2": (_POINTER,),
}


class CudaError(DriverError):
    """A call failed. `call` is the driver's name of it, `code` its CUresult, `words` what it says about it."""


class CudaUnavailable(CudaError):
    """There is no such library or no such function in it: no driver, not on the loader's path, or too old."""

    def __str__(self) -> str:
        return f"{self.call} is not available: {self.words}"


class Cuda:
    """The driver, loaded and initialised. Every method raises `CudaError` with the driver's words."""

    def __init__(self, library: str | os.PathLike[str] = LIBRARY) -> None:
        path = os.fspath(library)
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise CudaUnavailable(path, 0, f"{error}; install NVIDIA's driver or set LD_LIBRARY_PATH") from error
        self._functions: dict[str, Any] = {}
        self._call("cuInit", 0)

    # ---- devices
    def device_count(self) -> int:
        """Number of GPUs that this process sees; CUDA_VISIBLE_DEVICES hides the others."""
        return self._out(_INT(), "cuDeviceGetCount")

    def device_name(self, device: int) -> str:
        """The kind of GPU, for example "NVIDIA H100 80GB HBM3"."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device(device))
        return name.value.decode(errors="replace")

    def device_id(self, device: int) -> str:
        """The GPU's name on the wire, the same in every process, whichever index CUDA_VISIBLE_DEVICES makes it: its
        UUID as nvidia-smi writes it, "GPU-...", or "MIG-..." for an instance of a partitioned GPU."""
        uuid = _Uuid()
        self._call("cuDeviceGetUuid_v2", ctypes.byref(uuid), self._device(device))
        prefix = "MIG" if _PARTITIONED in self.device_name(device) else "GPU"
        return f"{prefix}-{UUID(bytes=bytes(uuid.bytes))}"

    def can_access_peer(self, device: int, peer: int) -> bool:
        """Whether kernels and copies of `device` reach the memory of `peer` without the host in between."""
        return bool(self._out(_INT(), "cuDeviceCanAccessPeer", self._device(device), self._device(peer)))

    # ---- contexts
    def retain_primary_context(self, device: int) -> int:
        """The device's primary context, with one more reference to it."""
        return self._out(_POINTER(), "cuDevicePrimaryCtxRetain", self._device(device))

    def release_primary_context(self, device: int) -> None:
        """One reference less; the last one destroys what is in it."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device(device))

    def set_current(self, context: int) -> None:
        """Makes the context the calling thread's."""
        self._call("cuCtxSetCurrent", context)

    @contextmanager
    def in_context(self, context: int) -> Iterator[None]:
        """The context is the calling thread's within the block."""
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._out(_POINTER(), "cuCtxPopCurrent_v2")

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        """The calling thread uses the device's primary context within the block."""
        context = self.retain_primary_context(device)
        try:
            with self.in_context(context):
                yield
        finally:
            self.release_primary_context(device)

    def enable_peer_access(self, context: int) -> None:
        """Lets the current context reach the memory of another device's context. Again changes nothing."""
        try:
            self._call("cuCtxEnablePeerAccess", context, 0)
        except CudaError as error:
            if error.code != PEER_ACCESS_ALREADY_ENABLED:
                raise

    def synchronize(self) -> None:
        """Waits for everything that was submitted to the current context."""
        self._call("cuCtxSynchronize")

    # ---- memory
    def malloc(self, size: int) -> int:
        """The address of `size` fresh bytes on the current device."""
        return self._out(_ADDRESS(), "cuMemAlloc_v2", size)

    def free(self, address: int) -> None:
        """Of `malloc`. What a process that has it open would see then is not defined: it closes first."""
        self._call("cuMemFree_v2", address)

    def allocation_of(self, address: int) -> tuple[int, int]:
        """Base and size in bytes of the allocation that the address lies in."""
        base, size = _ADDRESS(), _SIZE()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        return base.value, size.value

    def is_ipc_capable(self, address: int) -> bool:
        """Whether the memory can be shared by a handle: cudaMalloc's can, mapped or pooled memory cannot."""
        return bool(self._out(_INT(), "cuPointerGetAttribute", IS_IPC_CAPABLE, address))

    # ---- sharing whole allocations
    def ipc_handle(self, base: int) -> bytes:
        """The handle of the allocation that begins at `base`. There is no call that ends it."""
        handle = IpcHandle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return bytes(handle)

    def ipc_open(self, handle: bytes) -> int:
        """The address here of another process's allocation; the current context has to be of the memory's device."""
        value = IpcHandle.from_buffer_copy(handle)
        return self._out(_ADDRESS(), "cuIpcOpenMemHandle_v2", value, IPC_LAZY_PEER_ACCESS)

    def ipc_close(self, address: int) -> None:
        """Of `ipc_open`."""
        self._call("cuIpcCloseMemHandle", address)

    # ---- copies
    def copy_async(self, destination: int, source: int, size: int, stream: int) -> None:
        """Copies `size` bytes of device memory, between devices too, after what is in the stream already."""
        self._call("cuMemcpyAsync", destination, source, size, stream)

    def read(self, host: int, source: int, size: int) -> None:
        """Copies device memory to a host address and waits. Lets go of the interpreter lock."""
        self._call("cuMemcpyDtoH_v2", host, source, size)

    def write(self, destination: int, host: int, size: int) -> None:
        """Copies from a host address to device memory and waits."""
        self._call("cuMemcpyHtoD_v2", destination, host, size)

    def create_stream(self) -> int:
        """A stream of the current context that waits for no other one."""
        return self._out(_POINTER(), "cuStreamCreate", STREAM_NON_BLOCKING)

    def synchronize_stream(self, stream: int) -> None:
        """Waits for everything in the stream. Lets go of the interpreter lock."""
        self._call("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """Of `create_stream`."""
        self._call("cuStreamDestroy_v2", stream)

    # ---- how calls are made
    def _device(self, index: int) -> int:
        return self._out(_INT(), "cuDeviceGet", index)

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            if not hasattr(self._library, name):
                raise CudaUnavailable(name, 0, "this driver does not have it; 470 (CUDA 11.4) is the oldest that does")
            function = getattr(self._library, name)
            function.argtypes = ARGUMENTS[name]
            self._functions[name] = function
        return function

    def _call(self, name: str, *arguments: object) -> None:
        code = self._function(name)(*arguments)
        if code:
            raise CudaError(name, code, self._words(code))

    def _out(self, result: Any, name: str, *arguments: object) -> int:
        """What the call gives through its first argument."""
        self._call(name, ctypes.byref(result), *arguments)
        return int(result.value or 0)

    def _words(self, code: int) -> str:
        said = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            if self._function(name)(code, ctypes.byref(text)) == 0 and text.value:
                said.append(text.value.decode(errors="replace"))
        return ": ".join(said)


@cache
def load(library: str = LIBRARY) -> Cuda:
    """This process's driver, loaded and initialised once. Raises `CudaError`."""
    return Cuda(library)
