"""One process of a row: makes the calls that it reads, a line of JSON for each, and nothing else.

It needs Python alone. Usage: `python -m weight_brokerd.proof.worker --user=UID LIBRARY ...`
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
    "text": ctypes.c_char_p,
    "size": ctypes.c_size_t,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
}
_VALUE_BYTES = 64
_NAMES_OF_ERRORS = "cuGetErrorName"


class _Value(ctypes.Structure):
    """64 bytes that a function takes by value."""

    _fields_ = (("bytes", ctypes.c_char * _VALUE_BYTES),)


class Worker:
    """The libraries, and the buffers that calls read."""

    def __init__(self, libraries: list[str]) -> None:
        self._libraries = [ctypes.CDLL(name) for name in libraries]
        self._kept: list[Any] = []

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Calls a function: the code, the out arguments, and the driver's name for an error."""
        function = self._find(request["call"])
        if function is None:
            return {"code": None, "out": [], "words": ""}
        outs: list[Any] = []
        arguments = [self._argument(kind, value, outs) for kind, value in request["arguments"]]
        code = function(*arguments)
        return {"code": code, "out": [_content(out) for out in outs], "words": self._words(code) if code else ""}

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
        if kind == "value":
            return _Value.from_buffer_copy(bytes.fromhex(value))
        return _SCALARS[kind](value)

    def _words(self, code: int) -> str:
        function, text = self._find(_NAMES_OF_ERRORS), ctypes.c_char_p()
        if function is None or function(code, ctypes.byref(text)) or not text.value:
            return ""
        return text.value.decode(errors="replace")


def _content(out: Any) -> Any:
    if isinstance(out, ctypes.c_char_p):
        return out.value.decode(errors="replace") if out.value else None
    return out.raw.hex() if isinstance(out, ctypes.Array) else out.value or 0


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    answers: list[dict[str, Any]] = []
    if not request["thread"]:
        return worker.call(request)
    thread = threading.Thread(target=lambda: answers.append(worker.call(request)))
    thread.start()
    thread.join()
    return answers[0]


def main() -> None:
    """Answers on standard output; what a library prints goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    user, *libraries = sys.argv[1:]
    worker = Worker(libraries)
    if (uid := int(user.removeprefix("--user="))) >= 0:  # after loading: files may be readable for the first user only
        os.setgroups([])
        os.setuid(uid)
    for line in sys.stdin:
        answers.write(json.dumps(_answer(worker, json.loads(line))) + "\n")
        answers.flush()
    os._exit(0)  # not through the driver's destructors


if __name__ == "__main__":
    main()
