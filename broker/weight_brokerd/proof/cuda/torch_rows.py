"""What torch does with GPU memory. These rows need a CUDA build of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from weight_brokerd.proof.cuda.scene import CudaScene
from weight_brokerd.proof.processes import SECONDS, NotRun
from weight_brokerd.proof.row import Table

_table: Table[CudaScene] = Table("470")
ROWS, row = _table.rows, _table.row
_SETTINGS = ("", "expandable_segments:True", "backend:cudaMallocAsync")


def _ask(scene: CudaScene, question: str, settings: str = "") -> Any:
    """What `weight_brokerd.proof.cuda.with_torch` answers in a fresh process. Raises NotRun without torch."""
    command = [sys.executable, "-m", "weight_brokerd.proof.cuda.with_torch", question]
    environment = {**scene.environment, "PYTORCH_CUDA_ALLOC_CONF": settings}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise NotRun(f"torch did not answer within {SECONDS:.0f} s") from None
    if done.returncode:
        raise NotRun((done.stderr.strip().splitlines() or [f"torch's process ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


@row(
    "G7",
    "cuPointerGetAttribute",
    done="attribute 10 (has a legacy handle) of a torch tensor: cudaMalloc, expandable segments, cudaMallocAsync",
    expected=(True, False, False),
    source="cuda.h 12.9, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE; audit of 2026, C8",
    needed_by="the refusals of expandable segments and of pools",
)
def allocators(scene: CudaScene) -> object:
    return tuple(_ask(scene, "is_shareable", settings) for settings in _SETTINGS)


@row(
    "G10",
    "cuMemcpyAsync",
    done="MULTILINEAR_64 of 400 tensors: computed on the GPU, and of the same bytes on the processor",
    expected=True,
    source="docs/design/digests.md: integer products wrap around",
    needed_by="verification after every transfer",
)
def digests(scene: CudaScene) -> object:
    return _ask(scene, "digests_agree")
