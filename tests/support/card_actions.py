"""What processes on an emulated Ascend host do in one go, because the steps have to happen in one thread or quickly."""

from __future__ import annotations

import ctypes
import os
import threading
import time

from support import acl


def read_through_pointer(address: int) -> bytes:
    """As the host code would that takes a device pointer for its own."""
    return ctypes.string_at(address, 1)


def kernel_view(address: int, size: int) -> bytes | None:
    """What a kernel on the card would see."""
    view = acl.library().cann_double_kernel_view
    view.restype = ctypes.c_void_p
    view.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    at = view(address, size)
    return None if at is None else ctypes.string_at(at, size)


def set_device_in_another_thread(device: int) -> int:
    """Returns the error of a malloc in this thread, after another one has set the device."""
    thread = threading.Thread(target=acl.set_device, args=(device,))
    thread.start()
    thread.join()
    try:
        acl.malloc(4096)
    except acl.AclError as error:
        return error.code
    return 0


def fail_without_aclinit() -> str:
    """What the driver says of a failure in a process that has not called aclInit."""
    library = ctypes.CDLL("libascendcl.so")
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert library.aclrtSetDevice(0) == 0
    assert library.aclrtFree(ctypes.c_void_p(1)) != 0
    return (library.aclGetRecentErrMsg() or b"").decode()


def call_without_device(device: int, function: str, *arguments: object) -> int:
    """The code of a call in a thread that has no device; this one has."""
    codes: list[int] = []
    acl.set_device(device)
    thread = threading.Thread(target=lambda: codes.append(getattr(acl.library(), function)(*arguments)))
    thread.start()
    thread.join()
    return codes[0]


def call_in_fork() -> int:
    """The error of aclrtSetDevice in a forked child."""
    child = os.fork()
    if not child:
        try:
            acl.set_device(0)
        except acl.AclError as error:
            os._exit(0 if error.code == 107002 else 2)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def blocked_stream() -> tuple[int, int]:
    """A stream that waits for a notify, and the notify."""
    notify = ctypes.c_void_p()
    stream = acl.create_stream()
    acl.call("rtNotifyCreate", 0, ctypes.byref(notify))
    acl.call("rtNotifyWait", notify, ctypes.c_void_p(stream))
    assert notify.value is not None
    return stream, notify.value


def unblock(notify: int) -> None:
    """Sets a notify from another stream."""
    stream = acl.create_stream()
    acl.call("rtNotifyRecord", ctypes.c_void_p(notify), ctypes.c_void_p(stream))
    acl.synchronize(stream)
    acl.call("aclrtDestroyStream", stream)
    acl.call("rtNotifyDestroy", ctypes.c_void_p(notify))


def copy_async(destination: int, source: int, size: int, stream: int) -> None:
    """Within the card."""
    acl.call("aclrtMemcpyAsync", destination, size, source, size, acl.DEVICE_TO_DEVICE, stream)


def wait_for_event_of(stream: int) -> None:
    """Records an event in the stream and waits for it."""
    event = acl.create_event()
    acl.call("aclrtRecordEvent", event, stream)
    acl.call("aclrtSynchronizeEvent", event)
    acl.call("aclrtDestroyEvent", event)


def make_wait(stream: int, other: int) -> None:
    """`stream` goes on when `other` has done what it has to do now."""
    event = acl.create_event()
    acl.call("aclrtRecordEvent", event, other)
    acl.call("aclrtStreamWaitEvent", stream, event)
    acl.call("aclrtDestroyEvent", event)


def copy_batch(pairs: list[tuple[int, int, int]]) -> None:
    """(destination, source, size) of each."""
    number = len(pairs)
    destinations, sources, sizes = zip(*pairs, strict=True)
    pointers, lengths = ctypes.c_void_p * number, ctypes.c_size_t * number
    failed = ctypes.c_size_t(number)
    acl.call(
        "aclrtMemcpyBatch",
        pointers(*destinations),
        lengths(*sizes),
        pointers(*sources),
        lengths(*sizes),
        number,
        None,
        None,
        0,
        ctypes.byref(failed),
    )


def run_callback(block: bool) -> bool:
    """Whether a callback that was put behind a copy runs in the thread that subscribed, and sees what was copied."""
    stream = acl.create_stream()
    source, destination = acl.malloc(4096), acl.malloc(4096)
    acl.write(source, b"x" * 4096)
    seen: list[tuple[int, bytes]] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    callback = kind(lambda _: seen.append((threading.get_ident(), acl.read(destination, 4096))))

    def take_report() -> None:
        acl.set_device(0)
        ready.wait()
        acl.call("aclrtProcessReport", 5000)

    ready = threading.Event()
    thread = threading.Thread(target=take_report)
    thread.start()
    assert thread.ident is not None
    acl.call("aclrtSubscribeReport", ctypes.c_uint64(thread.ident), ctypes.c_void_p(stream))
    copy_async(destination, source, 4096, stream)
    acl.call("aclrtLaunchCallback", callback, None, int(block), ctypes.c_void_p(stream))
    ready.set()
    thread.join()
    acl.synchronize(stream)
    return seen == [(thread.ident, b"x" * 4096)]


def map_chunks(chunks: int, device: int, size: int = acl.CHUNK) -> tuple[int, list[int]]:
    """Fresh chunks at consecutive addresses: the first address and the handles."""
    address = acl.reserve(chunks * size)
    handles = [acl.malloc_physical(size, device) for _ in range(chunks)]
    for index, handle in enumerate(handles):
        acl.map_chunk(address + index * size, size, handle)
    return address, handles


def map_shared(shareables: list[int], device: int) -> tuple[int, list[int]]:
    """Other processes' chunks at consecutive addresses."""
    handles = [acl.import_chunk(shareable, device) for shareable in shareables]
    address = acl.reserve(len(handles) * acl.CHUNK)
    for index, handle in enumerate(handles):
        acl.map_chunk(address + index * acl.CHUNK, acl.CHUNK, handle)
    return address, handles


def unmap_chunks(address: int, handles: list[int]) -> None:
    """Of either."""
    for index, handle in enumerate(handles):
        acl.unmap(address + index * acl.CHUNK)
        acl.free_physical(handle)
    acl.release(address)


def meet(root: bytes, rank: int) -> tuple[int, int]:
    """A communicator and a stream for it."""
    return acl.create_communicator(root, rank), acl.create_stream()


def part(communicator: int, stream: int) -> None:
    """Gives both back, whatever still waits in the stream."""
    acl.call("aclrtDestroyStreamForce", stream)
    acl.call("HcclCommDestroy", communicator)


def send(communicator: int, stream: int, peer: int, address: int, size: int, wait_ms: int = 30_000) -> float:
    """Sends bytes and waits; returns the seconds."""
    begun = time.monotonic()
    acl.call("HcclSend", address, size, 0, peer, communicator, stream)
    acl.synchronize(stream, wait_ms)
    return time.monotonic() - begun


def receive(communicator: int, stream: int, peer: int, address: int, size: int, wait_ms: int = 30_000) -> float:
    """Receives bytes and waits; returns the seconds."""
    begun = time.monotonic()
    acl.call("HcclRecv", address, size, 0, peer, communicator, stream)
    acl.synchronize(stream, wait_ms)
    return time.monotonic() - begun


def communicator_error(communicator: int) -> int:
    """HcclGetCommAsyncError."""
    error = ctypes.c_int32()
    acl.call("HcclGetCommAsyncError", ctypes.c_void_p(communicator), ctypes.byref(error))
    return error.value


def destroy_while_another_thread_waits(communicator: int, address: int) -> bool:
    """Receives from a peer that is lost; whether waiting for the device ends when the stream is destroyed."""
    stream = acl.create_stream()
    acl.call("HcclRecv", address, 4096, 0, 0, communicator, stream)

    def wait() -> None:
        acl.set_device(1)
        acl.call("aclrtSynchronizeDevice")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.2)
    waits = thread.is_alive()
    acl.call("aclrtDestroyStreamForce", stream)
    thread.join(60)
    return waits and not thread.is_alive()
