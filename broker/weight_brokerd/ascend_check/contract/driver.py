"""A row's view of the driver: processes, and short names for the calls that most rows need."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self, cast

SECONDS = 60.0
"""The longest that a call may take; then its process is killed."""
MIB = 1 << 20
CHUNK = 2 * MIB
KEY_BYTES = 65
HBM_HUGE_PAGES = 4
TO_DEVICE, FROM_DEVICE, WITHIN_DEVICE = 1, 2, 3
ROOT_INFO_BYTES = 4108
PORTS_CHOSEN = {"HCCL_NPU_SOCKET_PORT_RANGE": "auto", "HCCL_HOST_SOCKET_PORT_RANGE": "auto"}

_CONTAINER = ("unshare", "--user", "--map-root-user", "--mount")

Argument = tuple[str, Any]
OUT_POINTER: Argument = ("out ptr", 0)
OUT_I32: Argument = ("out i32", 0)
OUT_U32: Argument = ("out u32", 0)
OUT_U64: Argument = ("out u64", 0)
OUT_SIZE: Argument = ("out size", 0)
NULL: Argument = ("ptr", None)


def i32(value: int) -> Argument:
    """An int32_t, or an enumeration."""
    return "i32", value


def u32(value: int) -> Argument:
    """A uint32_t."""
    return "u32", value


def u64(value: int) -> Argument:
    """A uint64_t."""
    return "u64", value


def size(value: int) -> Argument:
    """A size_t."""
    return "size", value


def pointer(value: int) -> Argument:
    """An address or a handle."""
    return "ptr", value


def content(value: str) -> Argument:
    """A pointer to these bytes, in hexadecimal."""
    return "bytes", value


class NotRun(Exception):
    """The row cannot be run here; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a row has made, for the report."""

    process: int
    """The row's processes are numbered from 1."""
    name: str
    code: int | None
    """None: the function or the process is gone."""
    words: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave."""

    code: Any
    """0, an error, or None if the function or the process is gone."""
    out: list[Any]
    words: str
    seconds: float = 0.0
    """How long the call took, in its process."""

    @property
    def value(self) -> Any:
        """Its first out argument."""
        return self.out[0] if self.out else None


class DriverProcess:
    """A process that calls the driver."""

    def __init__(
        self,
        environment: Mapping[str, str],
        note: Callable[[str, Answer], None],
        options: Sequence[str] = (),
        wrapper: Sequence[str] = (),
    ) -> None:
        """`note` is called with every answer; `options`: of `worker`; `wrapper`: the command that starts it."""
        self._note = note
        self._child = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "weight_brokerd.ascend_check.contract.worker", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=dict(environment),
        )
        self._in, self._out = cast("IO[str]", self._child.stdin), cast("IO[str]", self._child.stdout)

    def begin(self, name: str, *arguments: Argument | str, **how: bool) -> Callable[[], Answer]:
        """Makes a call; what is returned waits for its answer. Raises NotRun if the function or the process is gone."""
        with contextlib.suppress(BrokenPipeError):
            self._in.write(json.dumps({"call": name, "arguments": arguments, **how}) + "\n")
            self._in.flush()

        def answer() -> Answer:
            timer = threading.Timer(SECONDS, self._child.kill)
            timer.start()
            line = self._out.readline()
            timer.cancel()
            if not line:
                raise self._gone(name, f"the process ended with {self._child.wait()} in {name}")
            found = json.loads(line)
            if found["code"] is None:
                raise self._gone(name, f"{name} is not in this CANN")
            answered = Answer(found["code"], found["out"], found["words"], found["seconds"])
            self._note(name, answered)
            return answered

        return answer

    def _gone(self, name: str, words: str) -> NotRun:
        self._note(name, Answer(None, [], words))
        return NotRun(words)

    def call(self, name: str, *arguments: Argument | str, **how: bool) -> Answer:
        """Calls a function. `thread=True`: in a fresh thread, which has no device."""
        return self.begin(name, *arguments, **how)()

    def code(self, name: str, *arguments: Argument, **how: bool) -> int:
        """Its code."""
        return int(self.call(name, *arguments, **how).code)

    def value(self, name: str, *arguments: Argument, **how: bool) -> Any:
        """Its first out argument. Raises NotRun if it fails: the row is about something else."""
        answer = self.call(name, *arguments, **how)
        if answer.code:
            raise NotRun(f"{name} failed with {answer.code}: {answer.words}")
        return answer.value

    def kill(self) -> None:
        """kill -9."""
        self._child.kill()
        self._child.wait()

    # ---- what most rows need
    def malloc(self, count: int) -> int:
        """Fresh bytes on the card."""
        return int(self.value("aclrtMalloc", OUT_POINTER, size(count), i32(0)))

    def write(self, address: int, text: str) -> int:
        """The code of copying these bytes to the card."""
        count = size(len(text) // 2)
        return self.code("aclrtMemcpy", pointer(address), count, content(text), count, i32(TO_DEVICE))

    def read(self, address: int, count: int = 4) -> tuple[int, str]:
        """The code, and the bytes."""
        answer = self.call("aclrtMemcpy", ("room", count), size(count), pointer(address), size(count), i32(FROM_DEVICE))
        return answer.code, answer.value if not answer.code else ""

    def copy_in_stream(self, destination: int, source: int, count: int) -> int:
        """The code of a copy of device memory in a stream: of beginning it, or of waiting for it."""
        stream = pointer(self.value("aclrtCreateStream", OUT_POINTER))
        ends = pointer(destination), size(count), pointer(source), size(count)
        code = self.code("aclrtMemcpyAsync", *ends, i32(WITHIN_DEVICE), stream)
        return code or self.code("aclrtSynchronizeStream", stream)

    def export(self, address: int, count: int, flags: int = 1) -> tuple[int, str]:
        """The code, and the key."""
        key = ("room", KEY_BYTES)
        answer = self.call("aclrtIpcMemGetExportKey", pointer(address), size(count), key, size(KEY_BYTES), u64(flags))
        return answer.code, answer.value

    def import_key(self, key: str, flags: int = 0) -> tuple[int, int]:
        """The code, and the address."""
        answer = self.call("aclrtIpcMemImportByKey", OUT_POINTER, content(key), u64(flags))
        return answer.code, answer.value

    def close_key(self, key: str, **how: bool) -> int:
        """The code of aclrtIpcMemClose."""
        return self.code("aclrtIpcMemClose", content(key), **how)

    def tgid(self) -> int:
        """By which exporters admit it."""
        return int(self.value("aclrtDeviceGetBareTgid", OUT_I32))

    def chunk(self, attribute: int = HBM_HUGE_PAGES, device: int = 0) -> Answer:
        """aclrtMallocPhysical."""
        return self.call("aclrtMallocPhysical", OUT_POINTER, size(CHUNK), ("chunk", [attribute, device]), u64(0))

    def reserve(self, count: int = CHUNK) -> int:
        """Reserved addresses."""
        return int(self.value("aclrtReserveMemAddress", OUT_POINTER, size(count), size(0), NULL, u64(1)))

    def map(self, address: int, handle: int, **how: bool) -> int:
        """The code of aclrtMapMem."""
        return self.code("aclrtMapMem", pointer(address), size(CHUNK), size(0), pointer(handle), u64(0), **how)

    def mapped_chunk(self) -> tuple[int, int]:
        """Address and handle of a fresh chunk."""
        address, handle = self.reserve(), self.chunk().value
        self.map(address, handle)
        return address, handle

    def share(self, handle: int, flags: int = 1, **how: bool) -> Answer:
        """aclrtMemExportToShareableHandle."""
        name = "aclrtMemExportToShareableHandle"
        return self.call(name, pointer(handle), i32(0), u64(flags), OUT_U64, **how)

    def admit(self, shareable: int, pids: list[int]) -> int:
        """The code of aclrtMemSetPidToShareableHandle."""
        return self.code("aclrtMemSetPidToShareableHandle", u64(shareable), ("pids", pids), size(len(pids)))

    def adopt(self, shareable: int, device: int = 0, **how: bool) -> Answer:
        """aclrtMemImportFromShareableHandle."""
        return self.call("aclrtMemImportFromShareableHandle", u64(shareable), i32(device), OUT_POINTER, **how)

    def missing(self, names: tuple[str, ...]) -> list[str]:
        """The functions that this CANN does not have."""
        return self.call("missing", *names).out


class Scene:
    """The processes of one row, and their calls. A context manager: the processes are gone at its end."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: what every process has."""
        self.calls: list[Call] = []
        self.environment = dict(environment)
        self._processes: list[DriverProcess] = []

    def fresh(self, visible: str | None = None, options: Sequence[str] = (), **environment: str) -> DriverProcess:
        """A process that has called nothing yet. `visible`: ASCEND_RT_VISIBLE_DEVICES; `options`: of `worker`."""
        variables = {**self.environment, **environment}
        if visible is not None:
            variables["ASCEND_RT_VISIBLE_DEVICES"] = visible
        return self._start(variables, options)

    def process(
        self, device: int = 0, visible: str | None = None, options: Sequence[str] = (), **environment: str
    ) -> DriverProcess:
        """A process that is initialised, on a device. Raises NotRun if there is none."""
        process = self.fresh(visible, options, **environment)
        process.code("aclInit", NULL)
        process.value("aclrtSetDevice", i32(device))
        return process

    def in_a_container(self) -> DriverProcess:
        """An initialised process in a mount namespace of its own, and not root for the host."""
        if shutil.which(_CONTAINER[0]) is None:
            raise NotRun(f"there is no {_CONTAINER[0]}")
        process = self._start(self.environment, wrapper=_CONTAINER)
        process.code("aclInit", NULL)
        return process

    def _start(
        self, variables: Mapping[str, str], options: Sequence[str] = (), wrapper: Sequence[str] = ()
    ) -> DriverProcess:
        number = len(self._processes) + 1

        def note(name: str, answer: Answer) -> None:
            self.calls.append(Call(number, name, answer.code, answer.words, answer.seconds))

        self._processes.append(DriverProcess(variables, note, options, wrapper))
        return self._processes[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
