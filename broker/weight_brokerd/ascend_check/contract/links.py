"""HCCL between two processes: ports, and what it sends. These rows set communicators up; the others do not."""

from __future__ import annotations

from weight_brokerd.ascend_check.contract.driver import (
    CHUNK,
    OUT_I32,
    OUT_POINTER,
    PORTS_CHOSEN,
    ROOT_INFO_BYTES,
    DriverProcess,
    NotRun,
    Scene,
    content,
    i32,
    pointer,
    u32,
    u64,
)
from weight_brokerd.ascend_check.contract.row import REFUSED, rows

ROWS, row = rows()
_PORTS = "hccl docs HCCL_NPU_SOCKET_PORT_RANGE.md, HCCL_HOST_SOCKET_PORT_RANGE.md; users: EJ0003, EI0019"
_SEND = "hcomm coll_send_executor.cc RunLoop: copied into the communicator's buffer"
_INT8 = 0
_BYTES = "abcd"


class End:
    """A rank."""

    def __init__(self, process: DriverProcess, communicator: int) -> None:
        self.process = process
        self.communicator = pointer(communicator)
        self._stream = pointer(process.value("aclrtCreateStream", OUT_POINTER))

    def move(self, call: str, address: int, peer: int) -> int:
        """The code of sending or receiving, and of waiting for it."""
        arguments = pointer(address), u64(CHUNK), i32(_INT8), u32(peer), self.communicator, self._stream
        return self.process.code(call, *arguments)

    def wait(self) -> int:
        """The code of waiting for what was put."""
        return self.process.code("aclrtSynchronizeStreamWithTimeout", self._stream, i32(30_000))


def connected(one: DriverProcess, other: DriverProcess) -> tuple[End, End]:
    """Two ranks of a communicator. Raises NotRun if there is none."""
    root = one.call("HcclGetRootInfo", ("room", ROOT_INFO_BYTES))
    if root.code:
        raise NotRun(f"HcclGetRootInfo failed with {root.code}: {root.words}")
    config = content("00" * 1024)
    name = "HcclCommInitRootInfoConfig"
    waiting = one.begin(name, u32(2), content(root.value), u32(0), config, OUT_POINTER)
    there = other.call(name, u32(2), content(root.value), u32(1), config, OUT_POINTER)
    here = waiting()
    if here.code or there.code:
        raise NotRun(f"{name} failed with {here.code}, {there.code}: {here.words or there.words}")
    return End(one, here.value), End(other, there.value)


def _moved(one: End, other: End, source: int, destination: int) -> tuple[int, str]:
    """The worst code of a transfer, and what arrived."""
    codes = [one.move("HcclSend", source, 1), other.move("HcclRecv", destination, 0), one.wait(), other.wait()]
    return max(codes), other.process.read(destination, 2)[1]


@row(
    "H1",
    "HcclGetRootInfo",
    "HcclCommInitRootInfoConfig",
    "HcclSend",
    "HcclRecv",
    "HcclGetCommAsyncError",
    "HcclCommDestroy",
    done="two cards: own memory, its bytes; the error of the communicator; destroyed",
    expected=(0, _BYTES, 0, 0),
    context="a thread with a device",
    owner="one destroy for each rank",
    source="hccl.h",
    needed_by="every transfer between cards",
)
def link(scene: Scene) -> object:
    one, other = connected(scene.process(0, **PORTS_CHOSEN), scene.process(1, **PORTS_CHOSEN))
    source, destination = one.process.malloc(CHUNK), other.process.malloc(CHUNK)
    one.process.write(source, _BYTES)
    code, read = _moved(one, other, source, destination)
    error = one.process.value("HcclGetCommAsyncError", one.communicator, OUT_I32)
    return code, read, error, one.process.code("HcclCommDestroy", one.communicator)


@row(
    "H4",
    "HcclSend",
    "HcclRecv",
    done="memory imported by key is sent into memory imported as a chunk: its bytes",
    expected=(0, _BYTES),
    context="a thread with a device",
    source=_SEND,
    needed_by="the direct path",
)
def imported(scene: Scene) -> object:
    owner, keeper = scene.process(0), scene.process(1)
    allocation = owner.malloc(CHUNK)
    owner.write(allocation, _BYTES)
    one, other = connected(scene.process(0, **PORTS_CHOSEN), scene.process(1, **PORTS_CHOSEN))
    _, source = one.process.import_key(owner.export(allocation, CHUNK)[1])
    shareable = keeper.share(keeper.chunk(device=1).value).value
    handle = other.process.adopt(shareable, 1).value
    destination = other.process.reserve()
    other.process.map(destination, int(handle))
    return _moved(one, other, source, destination)


@row(
    "H2",
    "HcclGetRootInfo",
    done="a second process on a card whose default ports another one holds",
    expected=REFUSED,
    context="a thread with a device",
    source=_PORTS,
    needed_by="the broker's processes have both variables: they share cards with engines",
)
def ports_in_use(scene: Scene) -> object:
    defaults = dict.fromkeys(PORTS_CHOSEN, "")
    connected(scene.process(0, **defaults), scene.process(1, **defaults))
    return scene.process(0, **defaults).code("HcclGetRootInfo", ("room", ROOT_INFO_BYTES))


@row(
    "H3",
    "HcclGetRootInfo",
    "HcclCommInitRootInfoConfig",
    done="two pairs on the same cards whose ports are `auto`, then one with default ports",
    expected=True,
    context="a thread with a device",
    source=_PORTS,
    needed_by="the same; an engine that starts later finds its ports free",
)
def ports_chosen(scene: Scene) -> object:
    defaults = dict.fromkeys(PORTS_CHOSEN, "")
    for variables in (PORTS_CHOSEN, PORTS_CHOSEN, defaults):
        connected(scene.process(0, **variables), scene.process(1, **variables))
    return True
