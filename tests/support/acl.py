"""ACL through ctypes, as far as tests need it. Device addresses are integers."""

from __future__ import annotations

import ctypes
from functools import cache

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
KEY_BYTES = 65
PAGE = 4096
ALREADY_INITIALISED = 100002
HUGE_PAGES = 4
"""ACL_HBM_MEM_HUGE, what a chunk is made of."""
CHUNK = 2 << 20
"""The granularity of physical chunks."""

_ADDRESSES = {
    "aclrtMalloc": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "aclrtFree": [ctypes.c_void_p],
    "aclrtMemcpy": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int],
    "aclrtMemcpyAsync": [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ],
    "aclrtMemcpyBatch": [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ],
    "aclrtMemset": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_size_t],
    "aclrtMemGetAddressRange": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    "aclrtGetMemInfo": [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p],
    "aclrtCreateStream": [ctypes.c_void_p],
    "aclrtDestroyStream": [ctypes.c_void_p],
    "aclrtDestroyStreamForce": [ctypes.c_void_p],
    "aclrtSynchronizeStreamWithTimeout": [ctypes.c_void_p, ctypes.c_int],
    "aclrtCreateEvent": [ctypes.c_void_p],
    "aclrtDestroyEvent": [ctypes.c_void_p],
    "aclrtRecordEvent": [ctypes.c_void_p, ctypes.c_void_p],
    "aclrtStreamWaitEvent": [ctypes.c_void_p, ctypes.c_void_p],
    "aclrtSynchronizeEvent": [ctypes.c_void_p],
    "aclrtIpcMemGetExportKey": [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint64,
    ],
    "aclrtIpcMemImportByKey": [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64],
    "aclrtIpcMemSetImportPid": [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t],
    "aclrtIpcMemClose": [ctypes.c_char_p],
    "aclrtMallocPhysical": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64],
    "aclrtFreePhysical": [ctypes.c_void_p],
    "aclrtReserveMemAddress": [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_uint64,
    ],
    "aclrtReleaseMemAddress": [ctypes.c_void_p],
    "aclrtMapMem": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_uint64],
    "aclrtUnmapMem": [ctypes.c_void_p],
    "aclrtMemRetainAllocationHandle": [ctypes.c_void_p, ctypes.c_void_p],
    "aclrtMemExportToShareableHandle": [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p],
    "aclrtMemSetPidToShareableHandle": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t],
    "aclrtMemImportFromShareableHandle": [ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p],
    "HcclGetRootInfo": [ctypes.c_char_p],
    "HcclCommInitRootInfo": [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_uint32, ctypes.c_void_p],
    "HcclCommDestroy": [ctypes.c_void_p],
    "HcclSend": [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ],
    "HcclRecv": [
        ctypes.c_void_p,
        ctypes.c_uint64,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ],
}


class AclError(Exception):
    """A call failed. `code` is ACL's or HCCL's; the text has the driver's words."""

    def __init__(self, call: str, code: int, words: str) -> None:
        super().__init__(call, code, words)
        self.call = call
        self.code = code
        self.words = words

    def __str__(self) -> str:
        return f"{self.call}: {self.code}: {self.words}"


@cache
def library() -> ctypes.CDLL:
    """The runtime that the loader finds, initialised."""
    loaded = ctypes.CDLL("libascendcl.so")
    for name, types in _ADDRESSES.items():
        if hasattr(loaded, name):
            getattr(loaded, name).argtypes = types
    loaded.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert loaded.aclInit(None) in (0, ALREADY_INITIALISED)
    return loaded


def call(name: str, *arguments: object) -> None:
    """Calls ACL; raises AclError."""
    code = getattr(library(), name)(*arguments)
    if code:
        raise AclError(name, code, (library().aclGetRecentErrMsg() or b"").decode())


def set_device(device: int) -> None:
    """Per thread, as everything that follows from it."""
    call("aclrtSetDevice", device)


def _out(name: str, *arguments: object) -> int:
    """Calls what gives a pointer or a handle through its first argument."""
    result = ctypes.c_void_p()
    call(name, ctypes.byref(result), *arguments)
    assert result.value is not None
    return result.value


def malloc(size: int) -> int:
    """The address of `size` fresh bytes."""
    return _out("aclrtMalloc", size, 0)


def free(address: int) -> None:
    """Of malloc."""
    call("aclrtFree", address)


def malloc_host(size: int) -> int:
    """The address of `size` bytes of pinned host memory."""
    return _out("aclrtMallocHost", ctypes.c_size_t(size))


def write(address: int, content: bytes) -> None:
    """Copies to the device, synchronously."""
    call("aclrtMemcpy", address, len(content), content, len(content), HOST_TO_DEVICE)


def read(address: int, size: int) -> bytes:
    """Copies from the device, synchronously."""
    content = ctypes.create_string_buffer(size)
    call("aclrtMemcpy", content, size, address, size, DEVICE_TO_HOST)
    return content.raw


def copy(destination: int, source: int, size: int) -> None:
    """Within the card, synchronously."""
    call("aclrtMemcpy", destination, size, source, size, DEVICE_TO_DEVICE)


def free_memory() -> int:
    """The bytes that are free on the current card."""
    free_bytes, total = ctypes.c_size_t(), ctypes.c_size_t()
    call("aclrtGetMemInfo", 0, ctypes.byref(free_bytes), ctypes.byref(total))
    return free_bytes.value


def bare_tgid() -> int:
    """The pid that an exporter has to put on its whitelist for this process."""
    pid = ctypes.c_int32()
    call("aclrtDeviceGetBareTgid", ctypes.byref(pid))
    return pid.value


def physical_card(device: int) -> int:
    """The card that a device index of this process means."""
    card = ctypes.c_int32()
    call("aclrtGetPhyDevIdByLogicDevId", device, ctypes.byref(card))
    return card.value


def logical_card(device: int) -> int:
    """The number of the card in the container."""
    card = ctypes.c_int32()
    call("aclrtGetLogicDevIdByUserDevId", device, ctypes.byref(card))
    return card.value


def device_count() -> int:
    """How many devices this process sees."""
    count = ctypes.c_uint32()
    call("aclrtGetDeviceCount", ctypes.byref(count))
    return count.value


# ---- streams and events
def create_stream() -> int:
    """A stream on the current card."""
    return _out("aclrtCreateStream")


def synchronize(stream: int, milliseconds: int = -1) -> None:
    """Waits for a stream."""
    call("aclrtSynchronizeStreamWithTimeout", stream, milliseconds)


def create_event() -> int:
    """An event."""
    return _out("aclrtCreateEvent")


# ---- sharing plain allocations
def export(address: int, size: int, *, any_process: bool = True) -> bytes:
    """The export key of a whole allocation."""
    key = ctypes.create_string_buffer(KEY_BYTES)
    call("aclrtIpcMemGetExportKey", address, size, key, KEY_BYTES, int(any_process))
    return key.value


def allow(key: bytes, *pids: int) -> None:
    """Puts bare TGIDs on the whitelist of a key."""
    call("aclrtIpcMemSetImportPid", key, (ctypes.c_int32 * len(pids))(*pids), len(pids))


def import_key(key: bytes) -> int:
    """The address at which another process's allocation is here."""
    return _out("aclrtIpcMemImportByKey", key, 0)


def close_key(key: bytes) -> None:
    """Gives up an import, or in the exporting process the key."""
    call("aclrtIpcMemClose", key)


# ---- virtual memory management
class _PhysicalProperties(ctypes.Structure):
    _fields_ = (
        ("handle_type", ctypes.c_uint32),
        ("allocation_type", ctypes.c_uint32),
        ("memory_attribute", ctypes.c_uint32),
        ("location_id", ctypes.c_uint32),
        ("location_type", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64),
    )


def malloc_physical(size: int, device: int, attribute: int = HUGE_PAGES) -> int:
    """The handle of a chunk."""
    properties = _PhysicalProperties(memory_attribute=attribute, location_id=device, location_type=1)
    return _out("aclrtMallocPhysical", size, ctypes.byref(properties), 0)


def free_physical(handle: int) -> None:
    """Gives up one reference to a chunk."""
    call("aclrtFreePhysical", handle)


def reserve(size: int) -> int:
    """The start of reserved addresses."""
    return _out("aclrtReserveMemAddress", size, 0, None, 1)


def release(address: int) -> None:
    """Of reserve."""
    call("aclrtReleaseMemAddress", address)


def map_chunk(address: int, size: int, handle: int) -> None:
    """Maps a chunk into reserved addresses."""
    call("aclrtMapMem", address, size, 0, handle, 0)


def unmap(address: int) -> None:
    """Of map_chunk."""
    call("aclrtUnmapMem", address)


def retain(address: int) -> int:
    """The handle of the chunk that is mapped at the address; to be freed like others."""
    handle = ctypes.c_void_p()
    call("aclrtMemRetainAllocationHandle", address, ctypes.byref(handle))
    assert handle.value is not None
    return handle.value


def export_chunk(handle: int, *, any_process: bool = True) -> int:
    """The shareable handle of a chunk."""
    shareable = ctypes.c_uint64()
    call("aclrtMemExportToShareableHandle", handle, 0, int(any_process), ctypes.byref(shareable))
    return shareable.value


def allow_chunk(shareable: int, *pids: int) -> None:
    """Puts bare TGIDs on the whitelist of a shareable handle."""
    call("aclrtMemSetPidToShareableHandle", shareable, (ctypes.c_int32 * len(pids))(*pids), len(pids))


def import_chunk(shareable: int, device: int) -> int:
    """The handle here of another process's chunk."""
    handle = ctypes.c_void_p()
    call("aclrtMemImportFromShareableHandle", shareable, device, ctypes.byref(handle))
    assert handle.value is not None
    return handle.value


# ---- point to point
def root_info() -> bytes:
    """What both ranks of a communicator need."""
    root = ctypes.create_string_buffer(4108)
    call("HcclGetRootInfo", root)
    return root.raw


def create_communicator(root: bytes, rank: int) -> int:
    """Waits for the other rank."""
    communicator = ctypes.c_void_p()
    call("HcclCommInitRootInfo", 2, root, rank, ctypes.byref(communicator))
    assert communicator.value is not None
    return communicator.value
