"""Which devices a process sees, in which order, and how they are named."""

from __future__ import annotations

from uuid import UUID

from weight_brokerd.proof.cuda.scene import (
    OUT_I32,
    OUT_TEXT,
    CudaProcess,
    CudaScene,
    i32,
    u32,
)
from weight_brokerd.proof.processes import NotRun
from weight_brokerd.proof.row import Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_VARIABLES = "CUDA C++ programming guide, CUDA environment variables"
_MIG = "MIG user guide, CUDA_VISIBLE_DEVICES"
_NO_DEVICE = 100
_NO_SUCH_ERROR = 99999


def _name(uuid: str, kind: str = "GPU") -> str:
    return f"{kind}-{UUID(hex=uuid)}"


def _uuids(process: CudaProcess, code: int) -> list[str]:
    return process.uuids() if not code else []


@row(
    "G0.init",
    "cuInit",
    "cuDeviceGetCount",
    done="cuDeviceGetCount before cuInit; cuInit(1); cuInit(0), again",
    expected=(3, 1, 0, 0),
    source="cuda.h 12.9, cuInit",
    needed_by="drivers.cuda.Cuda",
)
def initialisation(scene: CudaScene) -> object:
    process = scene.fresh()
    early = process.code("cuDeviceGetCount", OUT_I32)
    return early, *(process.code("cuInit", u32(flags)) for flags in (1, 0, 0))


@row(
    "G0.words",
    "cuGetErrorName",
    "cuGetErrorString",
    done="the name of error 201; its text is there; code and name of an error that does not exist",
    expected=("CUDA_ERROR_INVALID_CONTEXT", True, 1, None),
    source="cuda.h 12.9, cuGetErrorName",
    needed_by="the words of every CudaError",
)
def words(scene: CudaScene) -> object:
    process = scene.initialised()
    name = process.call("cuGetErrorName", i32(201), OUT_TEXT).value
    text = process.call("cuGetErrorString", i32(201), OUT_TEXT).value
    unknown = process.call("cuGetErrorName", i32(_NO_SUCH_ERROR), OUT_TEXT)
    return name, bool(text), unknown.code, unknown.value


@row(
    "G0.device",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    done="the device after the last; a name; as many different UUIDs as devices",
    expected=(101, True, True),
    source="cuda.h 12.9, cuDeviceGet, cuDeviceGetUuid_v2",
    needed_by="Card.device_id",
)
def device(scene: CudaScene) -> object:
    process = scene.initialised()
    count = process.count()
    return process.code("cuDeviceGet", OUT_I32, i32(count)), bool(process.name()), len(set(process.uuids())) == count


@row(
    "G9.visible",
    "cuInit",
    "cuDeviceGetUuid_v2",
    done="the UUIDs with CUDA_VISIBLE_DEVICES of the last index; of its UUID; of that UUID's first 8 digits; of its "
    "index and a wrong one; cuInit with an empty list",
    expected=(True, True, True, True, _NO_DEVICE),
    source=_VARIABLES,
    needed_by="regions name their GPU by UUID; indexes differ between processes",
)
def visible(scene: CudaScene) -> object:
    everything = scene.initialised().uuids()
    last = len(everything) - 1
    name = _name(everything[last])
    lists = (str(last), name, name[:12], f"{last},{len(everything)},0")
    seen = [scene.initialised(names).uuids() == everything[last:] for names in lists]
    return *seen, scene.fresh("").code("cuInit", u32(0))


@row(
    "G9.order",
    "cuDeviceGetUuid_v2",
    done="with CUDA_DEVICE_ORDER=PCI_BUS_ID: the same UUIDs; index 1 in CUDA_VISIBLE_DEVICES is the second on the bus",
    expected=(True, True),
    source=_VARIABLES,
    needed_by="the broker and an instance may count GPUs in different orders",
)
def order(scene: CudaScene) -> object:
    everything = scene.two_devices().uuids()
    on_bus = scene.initialised(CUDA_DEVICE_ORDER="PCI_BUS_ID").uuids()
    second = scene.initialised("1", CUDA_DEVICE_ORDER="PCI_BUS_ID").uuids()
    return sorted(on_bus) == sorted(everything), second == on_bus[1:2]


@row(
    "G9.partition",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    done='of a partitioned GPU: " MIG " is in the name; devices that the process sees; the same UUID by '
    "CUDA_VISIBLE_DEVICES=MIG-..., none by GPU-...",
    expected=(True, 1, True, []),
    source=_MIG,
    needed_by="Cuda.device_id begins with MIG-",
)
def partition(scene: CudaScene) -> object:
    process = scene.initialised()
    if " MIG " not in process.name():
        raise NotRun("this process sees no instance of a partitioned GPU (MIG)")
    uuid = process.uuid()
    by_name = scene.fresh(_name(uuid, "MIG"))
    by_card = scene.fresh(_name(uuid))
    found = _uuids(by_name, by_name.code("cuInit", u32(0)))
    return True, process.count(), found == [uuid], _uuids(by_card, by_card.code("cuInit", u32(0)))
