"""Looks at Ascend's runtime and at torch_npu for the doctor: `python -m weight_broker.cli.doctor.probe` prints JSON.

It opens no card, which would take memory on it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from typing import Any

from weight_broker.drivers import acl, cann_symbols

_NEWER = ("aclrtMemGetAddressRange",)
"""CANN 9.0 has it; the client does without."""
_NEEDED = tuple(name for name in acl.ARGUMENTS if name.startswith(("aclrtIpcMem", "aclrtMem")) and name not in _NEWER)


def main() -> dict[str, Any]:
    """What there is."""
    answer: dict[str, Any] = {}
    try:
        runtime = acl.load()
        answer["runtime"] = True
        answer["missing"] = [name for name in _NEEDED if not runtime.has(name)]
        answer["devices"] = runtime.device_count()
    except acl.AclError as error:
        answer["problem"] = str(error)
    if "runtime" in answer:
        answer["cann"] = cann_symbols.look()
    if importlib.util.find_spec("torch_npu") is not None:
        try:
            answer["torch_npu"] = importlib.metadata.version("torch_npu")
            importlib.import_module("torch_npu")
        except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
            answer["torch_npu_problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return answer


if __name__ == "__main__":
    # Libraries print what they like; the answer is the last line.
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    private.write(json.dumps(main()) + "\n")
    private.flush()
    os._exit(0)  # a runtime that hangs in its destructors is no concern of the doctor
