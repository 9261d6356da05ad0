"""Ascend's runtime (libascendcl) through ctypes: the calls that sharing device memory needs, each of them checked.

Methods are named after CANN's functions, addresses and handles are integers. The library is loaded when an `Acl` is
made, never on import. As in CANN, the current device belongs to the calling thread.
"""

from __future__ import annotations

import ctypes
import enum
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from weight_broker.drivers.error import DriverError

LIBRARY = "libascendcl.so"
KEY_BYTES = 65
"""Room for an export key, with the zero that ends it."""
ALREADY_INITIALISED = 100002
"""ACL_ERROR_REPEAT_INITIALIZE"""
NO_CONTEXT = 107002
"""ACL_ERROR_RT_CONTEXT_NULL: the thread has no device yet."""

EXPORT_VALIDATES_PIDS = 0
EXPORT_TO_ANY_PROCESS = 1
"""ACL_RT_IPC_MEM_EXPORT_FLAG_DISABLE_PID_VALIDATION, and the same of VMM: who knows the key may import."""
IMPORT_DEFAULT = 0
IMPORT_WITH_PEER_ACCESS = 1
"""ACL_RT_IPC_MEM_IMPORT_FLAG_ENABLE_PEER_ACCESS"""

CHUNK_UNIT = 2 << 20
"""Chunks are multiples of it."""
_MALLOC_HUGE_FIRST = 0
_HANDLE_TYPE_NONE = 0
_HUGE_PAGES = 1
_HBM_HUGE_PAGES = 4
"""ACL_HBM_MEM_HUGE. The runtime refuses 0, which is the host's kind of memory."""
_LOCATION_DEVICE = 1

_POINTER, _SIZE, _FLAGS = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
_INT32, _UINT32, _TEXT = ctypes.c_int32, ctypes.c_uint32, ctypes.c_char_p
ARGUMENTS: Mapping[str, Sequence[Any]] = {
    "aclInit": (_TEXT,),
    "aclrtSetDevice": (_INT32,),
    "aclrtResetDevice": (_INT32,),
    "aclrtGetDevice": (_POINTER,),
    "aclrtGetDeviceCount": (_POINTER,),
    "aclrtSynchronizeDevice": (),
    "aclrtDeviceEnablePeerAccess": (_INT32, _UINT32),
    "aclrtMalloc": (_POINTER, _SIZE, ctypes.c_int),
    "aclrtFree": (_POINTER,),
    "aclrtMemcpy": (_POINTER, _SIZE, _POINTER, _SIZE, ctypes.c_int),
    "aclrtMemcpyAsync": (_POINTER, _SIZE, _POINTER, _SIZE, ctypes.c_int, _POINTER),
    "aclrtCreateStream": (_POINTER,),
    "aclrtSynchronizeStream": (_POINTER,),
    "aclrtDestroyStream": (_POINTER,),
    "aclrtDeviceGetBareTgid": (_POINTER,),
    "aclrtGetLogicDevIdByUserDevId": (_INT32, _POINTER),
    "aclrtGetPhyDevIdByLogicDevId": (_INT32, _POINTER),
    "aclrtIpcMemGetExportKey": (_POINTER, _SIZE, _TEXT, _SIZE, _FLAGS),
    "aclrtIpcMemSetImportPid": (_TEXT, _POINTER, _SIZE),
    "aclrtIpcMemImportByKey": (_POINTER, _TEXT, _FLAGS),
    "aclrtIpcMemClose": (_TEXT,),
    "aclrtReserveMemAddress": (_POINTER, _SIZE, _SIZE, _POINTER, _FLAGS),
    "aclrtReleaseMemAddress": (_POINTER,),
    "aclrtMallocPhysical": (_POINTER, _SIZE, _POINTER, _FLAGS),
    "aclrtMapMem": (_POINTER, _SIZE, _SIZE, _POINTER, _FLAGS),
    "aclrtUnmapMem": (_POINTER,),
    "aclrtFreePhysical": (_POINTER,),
    "aclrtMemGetAddressRange": (_POINTER, _POINTER, _POINTER),
    "aclrtMemRetainAllocationHandle": (_POINTER, _POINTER),
    "aclrtMemExportToShareableHandle": (_POINTER, ctypes.c_int, _FLAGS, _POINTER),
    "aclrtMemSetPidToShareableHandle": (_FLAGS, _POINTER, _SIZE),
    "aclrtMemImportFromShareableHandle": (_FLAGS, _INT32, _POINTER),
}


class _PhysicalProperties(ctypes.Structure):
    """aclrtPhysicalMemProp; zeros are: no handle type, pinned."""

    _fields_ = (
        ("handle_type", _UINT32),
        ("allocation_type", _UINT32),
        ("memory_attribute", _UINT32),
        ("location_id", _UINT32),
        ("location_type", _UINT32),
        ("reserved", _FLAGS),
    )


class MemcpyKind(enum.IntEnum):
    """aclrtMemcpyKind."""

    HOST_TO_HOST = 0
    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    DEVICE_TO_DEVICE = 3


class AclError(DriverError):
    """A call failed. `call` is CANN's name of it, `code` ACL's error, `words` what the driver says about it."""


class AclUnavailable(AclError):
    """There is no such library or no such function in it: no CANN, not on the loader's path, or too old."""

    def __str__(self) -> str:
        return f"{self.call} is not available: {self.words}"


class Acl:
    """The runtime, loaded. Every method raises `AclError` with the driver's words."""

    def __init__(self, library: str | os.PathLike[str] = LIBRARY) -> None:
        path = os.fspath(library)
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise AclUnavailable(path, 0, f"{error}; source CANN's set_env.sh or set LD_LIBRARY_PATH") from error
        self._functions: dict[str, Any] = {}

    # ---- devices
    def initialize(self) -> None:
        """For a process in which no framework has done so; once or more often."""
        try:
            self._call("aclInit", None)
        except AclError as error:
            if error.code != ALREADY_INITIALISED:
                raise

    def set_device(self, device: int) -> None:
        """Makes `device` (an index of this process) the calling thread's current one."""
        self._call("aclrtSetDevice", device)

    def reset_device(self, device: int) -> None:
        """Gives back what this process has on `device`."""
        self._call("aclrtResetDevice", device)

    def current_device(self) -> int | None:
        """The calling thread's device; None if it has none yet."""
        try:
            return self._out(_INT32(), "aclrtGetDevice")
        except AclError as error:
            if error.code != NO_CONTEXT:
                raise
            return None

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        """The calling thread is on `device` within the block and on its own device, if it had one, after it."""
        before = self.current_device()
        if before != device:
            self.set_device(device)
        try:
            yield
        finally:
            if before is not None and before != device:
                self.set_device(before)

    def device_count(self) -> int:
        """Number of devices that this process sees."""
        return self._out(_UINT32(), "aclrtGetDeviceCount")

    def synchronize_device(self) -> None:
        """Waits for everything that was submitted to the current device. What a framework holds back in a queue of its
        own has not been submitted: the framework has to synchronise first."""
        self._call("aclrtSynchronizeDevice")

    def physical_device(self, device: int) -> int:
        """The physical number of the card behind an index of this process.

        With a CANN that cannot tell (before 8.3), ASCEND_RT_VISIBLE_DEVICES is taken at its word; then, in a container
        that has a part of the cards, the number is the container's and not the host's.
        """
        if self.has("aclrtGetPhyDevIdByLogicDevId"):
            # In spite of its name it takes the index of this process, and maps that to the logical number itself.
            return self._out(_INT32(), "aclrtGetPhyDevIdByLogicDevId", device, last=True)
        return visible_device(device, os.environ.get("ASCEND_RT_VISIBLE_DEVICES"))

    def logical_device(self, device: int) -> int | None:
        """The number of the card in this process's container, as in shareable handles; None if CANN cannot tell."""
        if not self.has("aclrtGetLogicDevIdByUserDevId"):
            return None
        return self._out(_INT32(), "aclrtGetLogicDevIdByUserDevId", device, last=True)

    def soc_name(self) -> str:
        """The kind of processor, for example "Ascend910B4"."""
        function = self._function("aclrtGetSocName")
        function.restype = _TEXT
        return (function() or b"").decode(errors="replace")

    def bare_tgid(self) -> int:
        """The pid by which exporters whitelist this process: the host's, also inside a container."""
        return self._out(_INT32(), "aclrtDeviceGetBareTgid")

    # ---- memory
    def malloc(self, size: int) -> int:
        """The address of `size` fresh bytes on the current device."""
        return self._address("aclrtMalloc", size, _MALLOC_HUGE_FIRST)

    def free(self, address: int) -> None:
        """Of `malloc`. The driver frees it at once, whoever uses it."""
        self._call("aclrtFree", address)

    def memcpy(self, destination: int, destination_size: int, source: int, size: int, kind: MemcpyKind) -> None:
        """Copies `size` bytes and waits for it. Lets go of the interpreter lock."""
        self._call("aclrtMemcpy", destination, destination_size, source, size, kind)

    def create_stream(self) -> int:
        """A stream of the current device, for `destroy_stream`."""
        return self._out(_POINTER(), "aclrtCreateStream")

    def copy_in_stream(self, destination: int, source: int, size: int, stream: int) -> None:
        """Begins to copy device memory. The driver copies imported chunks, and between cards, in this way only."""
        self._call("aclrtMemcpyAsync", destination, size, source, size, MemcpyKind.DEVICE_TO_DEVICE, stream)

    def synchronize_stream(self, stream: int) -> None:
        """Waits for all that was begun; raises if any of it failed."""
        self._call("aclrtSynchronizeStream", stream)

    def destroy_stream(self, stream: int) -> None:
        """Of `create_stream`, when nothing is under way."""
        self._call("aclrtDestroyStream", stream)

    def enable_peer_access(self, device: int) -> None:
        """Lets the thread's current device reach memory of another device, in this process and until it ends."""
        self._call("aclrtDeviceEnablePeerAccess", device, 0)

    # ---- sharing whole allocations
    def ipc_export_key(self, address: int, size: int, flags: int = EXPORT_VALIDATES_PIDS) -> bytes:
        """A key of an allocation, or of a part of it that begins with a page."""
        key = ctypes.create_string_buffer(KEY_BYTES)
        self._call("aclrtIpcMemGetExportKey", address, size, key, KEY_BYTES, flags)
        return key.value

    def ipc_set_import_pids(self, key: bytes, pids: Sequence[int]) -> None:
        """Lets the processes with these bare TGIDs import."""
        self._call("aclrtIpcMemSetImportPid", key, (_INT32 * len(pids))(*pids), len(pids))

    def ipc_import(self, key: bytes, flags: int = IMPORT_DEFAULT) -> int:
        """The address here of another process's allocation; the current device has to be the memory's."""
        return self._address("aclrtIpcMemImportByKey", key, flags)

    def ipc_close(self, key: bytes) -> None:
        """Gives up the import, or in the exporting process the key. The driver does not refuse the latter: it takes the
        memory from every process that has imported it, whatever that process does with it at the time."""
        self._call("aclrtIpcMemClose", key)

    # ---- sharing chunks (virtual memory management)
    def reserve_address(self, size: int) -> int:
        """The start of `size` reserved bytes of addresses."""
        return self._address("aclrtReserveMemAddress", size, 0, None, _HUGE_PAGES)

    def release_address(self, address: int) -> None:
        """Of `reserve_address`; nothing may be mapped there any more."""
        self._call("aclrtReleaseMemAddress", address)

    def malloc_physical(self, size: int, device: int) -> int:
        """The handle of a fresh chunk of `size` bytes (a multiple of 2 MiB) on a device, for `map` and in the end
        `free_physical`."""
        properties = _PhysicalProperties(
            memory_attribute=_HBM_HUGE_PAGES, location_id=device, location_type=_LOCATION_DEVICE
        )
        return self._address("aclrtMallocPhysical", size, ctypes.byref(properties), 0)

    def map(self, address: int, size: int, handle: int) -> None:
        """Maps a chunk of `size` bytes into reserved addresses."""
        self._call("aclrtMapMem", address, size, 0, handle, 0)

    def unmap(self, address: int) -> None:
        """Of `map`."""
        self._call("aclrtUnmapMem", address)

    def retain_allocation_handle(self, address: int) -> int:
        """The handle of the chunk that is mapped at the address; one more reference, for `free_physical`."""
        return self._out(_POINTER(), "aclrtMemRetainAllocationHandle", address, last=True)

    def chunk_bytes(self, address: int, end: int) -> int:
        """The size of the chunk that begins at `address`, in a segment that ends at `end`."""
        if self.has("aclrtMemGetAddressRange"):
            base, size = _POINTER(), _SIZE()
            self._call("aclrtMemGetAddressRange", address, ctypes.byref(base), ctypes.byref(size))
            return size.value
        # CANN 8.5 cannot be asked, but gives a handle only where a chunk begins.
        return (
            next((at for at in range(address + CHUNK_UNIT, end, CHUNK_UNIT) if self._begins_chunk(at)), end) - address
        )

    def _begins_chunk(self, address: int) -> bool:
        try:
            self.free_physical(self.retain_allocation_handle(address))
        except AclError:
            return False
        return True

    def free_physical(self, handle: int) -> None:
        """Gives up one reference to a chunk."""
        self._call("aclrtFreePhysical", handle)

    def export_shareable_handle(self, handle: int, flags: int = EXPORT_VALIDATES_PIDS) -> int:
        """The shareable handle of a chunk. It ends with the chunk; there is no call that ends it."""
        shareable = ctypes.c_uint64()
        return self._out(shareable, "aclrtMemExportToShareableHandle", handle, _HANDLE_TYPE_NONE, flags, last=True)

    def set_pids_to_shareable_handle(self, shareable: int, pids: Sequence[int]) -> None:
        """Lets the processes with these bare TGIDs import."""
        self._call("aclrtMemSetPidToShareableHandle", shareable, (_INT32 * len(pids))(*pids), len(pids))

    def import_shareable_handle(self, shareable: int, device: int) -> int:
        """The handle here of another process's chunk, for `map` and in the end `free_physical`."""
        return self._out(_POINTER(), "aclrtMemImportFromShareableHandle", shareable, device, last=True)

    # ---- how calls are made
    def has(self, name: str) -> bool:
        """Whether this CANN has the function."""
        return hasattr(self._library, name)

    def recent_message(self) -> str:
        """What the driver says about the calling thread's last failure; empty if it says nothing."""
        if not self.has("aclGetRecentErrMsg"):
            return ""
        function = self._library.aclGetRecentErrMsg
        function.restype = _TEXT
        return (function() or b"").decode(errors="replace").strip()

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            if not self.has(name):
                raise AclUnavailable(name, 0, "this CANN does not have it; 8.3.RC1 is the oldest that shares memory")
            function = getattr(self._library, name)
            function.argtypes = ARGUMENTS.get(name, ())
            self._functions[name] = function
        return function

    def _call(self, name: str, *arguments: object) -> None:
        code = self._function(name)(*arguments)
        if code:
            raise AclError(name, code, self.recent_message())

    def _out(self, result: Any, name: str, *arguments: object, last: bool = False) -> int:
        """What the call gives through its first or `last` argument."""
        pointer = ctypes.byref(result)
        self._call(name, *((*arguments, pointer) if last else (pointer, *arguments)))
        return int(result.value or 0)

    def _address(self, name: str, *arguments: object) -> int:
        return self._out(_POINTER(), name, *arguments)


@cache
def load(library: str = LIBRARY) -> Acl:
    """This process's runtime, loaded once. Raises `AclUnavailable`."""
    return Acl(library)


def visible_device(device: int, visible: str | None) -> int:
    """The number that ASCEND_RT_VISIBLE_DEVICES (`visible`) gives to an index; without the variable, the index."""
    if not visible:
        return device
    numbers = [number.strip() for number in visible.split(",")]
    if not 0 <= device < len(numbers) or not numbers[device].isdecimal():
        raise AclError("ASCEND_RT_VISIBLE_DEVICES", 0, f"{visible!r} has no number for device {device}")
    return int(numbers[device])


def device_id(acl: Acl, device_index: int) -> str:
    """The card's name on the wire, the same in every process of the host: "npu:3" for the physical card 3."""
    return f"npu:{acl.physical_device(device_index)}"
