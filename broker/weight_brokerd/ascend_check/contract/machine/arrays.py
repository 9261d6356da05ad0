"""What the product assumes of torch_npu: formats, padding, segments, and that its memory can be shared."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

from weight_brokerd.ascend_check.contract.driver import NotRun, Scene
from weight_brokerd.ascend_check.contract.row import UNKNOWN, rows

ROWS, row = rows()
_PROCESS = "weight_brokerd.ascend_check.contract.machine.torch_process"
_SECONDS = 50.0
_DONE = "tensors of torch_npu, ND and NZ, {}: is NZ storage whole; do tensors lie in segments; are they shared; details"
_EXPECTED = (True, True, True, UNKNOWN)
_SOURCE = "torch_npu v2.7.1-7.2.0 NPUCachingAllocator.cpp, StorageDescHelper.cpp"


def _looked_at(scene: Scene, allocation: str) -> object:
    if importlib.util.find_spec("torch_npu") is None:
        raise NotRun("torch_npu is not installed in this environment")
    done = subprocess.run(
        [sys.executable, "-m", _PROCESS],
        env={**scene.environment, "PYTORCH_NPU_ALLOC_CONF": allocation},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise NotRun(f"torch_npu's process ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["whole"], found["inside"], found["shared"], found["details"]


@row(
    "P14.plain",
    "aclrtIpcMemGetExportKey",
    done=_DONE.format("expandable_segments:False"),
    expected=_EXPECTED,
    context="a thread with a device",
    source=_SOURCE,
    needed_by="publication of an engine's tensors, plain allocations",
)
def plain(scene: Scene) -> object:
    return _looked_at(scene, "expandable_segments:False")


@row(
    "P14.expandable",
    "aclrtMemExportToShareableHandle",
    done=_DONE.format("expandable_segments:True"),
    expected=_EXPECTED,
    source=_SOURCE,
    needed_by="publication of an engine's tensors, expandable segments (the default of vLLM Ascend)",
)
def expandable(scene: Scene) -> object:
    return _looked_at(scene, "expandable_segments:True")


@row(
    "P14.huge",
    "aclrtMemExportToShareableHandle",
    done=_DONE.format("page_size:1g,expandable_segments:True"),
    expected=_EXPECTED,
    source=_SOURCE + "; vllm-ascend platform.py 0.18",
    needed_by="publication of an engine's tensors, chunks of 1 GiB",
)
def huge(scene: Scene) -> object:
    return _looked_at(scene, "page_size:1g,expandable_segments:True")
