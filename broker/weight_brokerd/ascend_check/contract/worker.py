"""One process of a row: calls Ascend's runtime as it is told, a line of JSON for each call, and nothing else.

Every row has processes of its own, because a fault on a card takes a process along. It needs Python alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import threading
import time
from typing import Any

_SCALARS: dict[str, Any] = {
    "ptr": ctypes.c_void_p,
    "size": ctypes.c_size_t,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
}
_LOCATION_DEVICE = 1
_NAMESPACES = {"mnt": 0x00020000, "net": 0x40000000}
"""CLONE_NEWNS, CLONE_NEWNET"""
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
        return {"code": 0, "out": [name for name in names if self._find(name) is None], "words": "", "seconds": 0.0}

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Calls a function. The answer has its code, what it put into its out arguments, and the driver's words."""
        if request["call"] == "missing":
            return self.missing(request["arguments"])
        function = self._find(request["call"])
        if function is None:
            return {"code": None, "out": [], "words": "there is no such function", "seconds": 0.0}
        function.restype = ctypes.c_void_p if request.get("pointer") else ctypes.c_int32
        outs: list[Any] = []
        arguments = [self._argument(kind, value, outs) for kind, value in request["arguments"]]
        began = time.monotonic()
        code = function(*arguments)
        seconds = round(time.monotonic() - began, 6)
        words = self._words() if code else ""
        return {"code": code, "out": [_content(out) for out in outs], "words": words, "seconds": seconds}

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


def _go_apart(options: argparse.Namespace) -> None:
    """Leaves the namespaces and the user that the process was started with. Raises OSError if that is not allowed."""
    for namespace in options.own:
        if ctypes.CDLL(None, use_errno=True).unshare(_NAMESPACES[namespace]):
            raise OSError(ctypes.get_errno(), f"unshare({namespace})")
    if options.uid is not None:
        os.setgroups(options.groups)
        os.setresgid(options.uid, options.uid, options.uid)
        os.setresuid(options.uid, options.uid, options.uid)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker")
    parser.add_argument("--own", choices=tuple(_NAMESPACES), action="append", default=[], help="namespace to leave")
    parser.add_argument("--uid", type=int, help="user and group to become")
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="other groups to be in")
    return parser.parse_args()


def main() -> None:
    """Answers on standard output; whatever a library prints goes to standard error."""
    _go_apart(_options())
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
