"""One process of a row: calls Ascend's runtime as it is told, a line of JSON for each call, and nothing else.

Every row has processes of its own, because a fault on a card takes a process along. It needs Python alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from typing import Any

_SCALARS: dict[str, Any] = {
    "ptr": ctypes.c_void_p,
    "size": ctypes.c_size_t,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
}
_LOCATION_DEVICE = 1
_LIBRARIES = ("libascendcl.so", "libhccl.so", "libruntime.so", "libhccl_plf.so", "libra.so")


class _PhysicalProperties(ctypes.Structure):
    """aclrtPhysicalMemProp."""

    _fields_ = (
        ("handle_type", ctypes.c_uint32),
        ("allocation_type", ctypes.c_uint32),
        ("memory_attribute", ctypes.c_uint32),
        ("location_id", ctypes.c_uint32),
        ("location_type", ctypes.c_uint32),
        ("reserved", ctypes.c_uint64),
    )


class Worker:
    """The libraries, and the buffers that calls were given."""

    def __init__(self) -> None:
        self._libraries = [*filter(None, map(_load, _LIBRARIES)), ctypes.CDLL(None)]
        self._kept: list[Any] = []

    def missing(self, names: list[str]) -> dict[str, Any]:
        """Those of the names that no library has."""
        return {"code": 0, "out": [name for name in names if self._find(name) is None], "words": ""}

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Calls a function. The answer has its code, what it put into its out arguments, and the driver's words."""
        if request["call"] == "missing":
            return self.missing(request["arguments"])
        function = self._find(request["call"])
        if function is None:
            return {"code": None, "out": [], "words": "there is no such function"}
        function.restype = ctypes.c_void_p if request.get("pointer") else ctypes.c_int32
        outs: list[Any] = []
        arguments = [self._argument(kind, value, outs) for kind, value in request["arguments"]]
        code = function(*arguments)
        return {"code": code, "out": [_content(out) for out in outs], "words": self._words() if code else ""}

    def _find(self, name: str) -> Any:
        return next((getattr(library, name) for library in self._libraries if hasattr(library, name)), None)

    def _argument(self, kind: str, value: Any, outs: list[Any]) -> Any:
        if kind.startswith("out "):
            outs.append(_SCALARS[kind[4:]]())
            return ctypes.byref(outs[-1])
        if kind == "room":  # filled by the call
            outs.append(ctypes.create_string_buffer(value))
            return outs[-1]
        if kind == "bytes":  # stays: the driver may read it later
            self._kept.append(ctypes.create_string_buffer(bytes.fromhex(value), len(value) // 2))
            return self._kept[-1]
        if kind in ("pointers", "sizes"):
            return (_SCALARS["ptr" if kind == "pointers" else "size"] * len(value))(*value)
        if kind == "pids":
            return (ctypes.c_int32 * len(value))(*value)
        if kind == "chunk":  # attribute and device
            attribute, device = value
            return ctypes.byref(
                _PhysicalProperties(memory_attribute=attribute, location_id=device, location_type=_LOCATION_DEVICE)
            )
        if kind == "function":
            return ctypes.cast(getattr(self._libraries[-1], value), ctypes.c_void_p)
        return _SCALARS[kind](value)

    def _words(self) -> str:
        function = self._find("aclGetRecentErrMsg")
        if function is None:
            return ""
        function.restype = ctypes.c_char_p
        return (function() or b"").decode(errors="replace").strip()[:300]


def _load(name: str) -> Any:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _content(out: Any) -> Any:
    return out.raw.hex() if isinstance(out, ctypes.Array) else out.value or 0


def main() -> None:
    """Answers on standard output; whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        request, box = json.loads(line), list[dict[str, Any]]()
        if request.get("thread"):
            thread = threading.Thread(target=lambda: box.append(worker.call(request)))  # noqa: B023
            thread.start()
            thread.join()
        else:
            box.append(worker.call(request))
        answers.write(json.dumps(box[0]) + "\n")
        answers.flush()
    os._exit(0)  # not through the driver's destructors


if __name__ == "__main__":
    main()
