"""All rows of NVIDIA's driver, and what is to be known of the machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weight_broker.drivers.cuda import LIBRARY
from weight_brokerd.proof.cuda import contexts, devices, memory, separation, sharing, torch_rows
from weight_brokerd.proof.cuda.scene import OUT_I32, CudaScene
from weight_brokerd.proof.processes import NotRun
from weight_brokerd.proof.row import Row

ROWS: tuple[Row[CudaScene], ...] = (
    *devices.ROWS,
    *contexts.ROWS,
    *memory.ROWS,
    *sharing.ROWS,
    *separation.ROWS,
    *torch_rows.ROWS,
)
DEVICE_FILES = r"/dev/nvidia\d+"
"""Of GPUs, not of the driver as a whole."""
_KERNEL_MODULE = Path("/proc/driver/nvidia/version")
_VARIABLES = ("CUDA_", "NVIDIA_", "PYTORCH_CUDA_ALLOC_CONF", "LD_LIBRARY_PATH")


def make_scene() -> CudaScene:
    """For one row."""
    return CudaScene()


def covered() -> frozenset[str]:
    """The functions that have a row."""
    return frozenset(name for row in ROWS for name in row.functions)


def facts(scene: CudaScene | None = None) -> dict[str, Any]:
    """Row G0: the driver, the GPUs, the variables. Raises NotRun if there is no GPU."""
    with scene or make_scene() as machine:
        try:
            process = machine.initialised()
        except NotRun as why:
            raise NotRun(f"no GPU: {why} ({LIBRARY})") from why
        return {
            "driver": process.value("cuDriverGetVersion", OUT_I32),
            "kernel_module": _KERNEL_MODULE.read_text() if _KERNEL_MODULE.exists() else "",
            "gpus": [
                {"name": process.name(index), "uuid": process.uuid(index), "compute_mode": process.attribute(20, index)}
                for index in range(process.count())
            ],
            "variables": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
        }
