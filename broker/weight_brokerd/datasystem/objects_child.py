"""The process for host objects: `python -m weight_brokerd.datasystem.objects_child --socket FD`.

The engine's KVClient holds the interpreter for as long as a call takes. So one thread does one request after the other;
whoever waits for too long kills the process.
"""

from __future__ import annotations

import argparse
import mmap
import os
import re
import socket
from typing import Any

from weight_brokerd.children.connection import Connection, belong_to_parent
from weight_brokerd.datasystem import object_messages as messages
from weight_brokerd.datasystem.object_value import ObjectValue

_CODE = re.compile(r"code: \[([^\]]*)\], msg: \[(.*)", re.DOTALL)
_MISSING = "Key not found"
_HARMLESS = {_MISSING, "Invalid parameter", "Out of memory"}
"""What the engine says when it is fine itself."""
_NOISE = re.compile(r"Thread ID \d+ |Line of code *:.*|traceId:.*", re.DOTALL)


class _EngineError(Exception):
    def __init__(self, call: str, error: Exception) -> None:
        found = _CODE.match(str(error))
        code, words = (found[1], found[2]) if found else ("", str(error))
        words = " ".join(_NOISE.sub("", words).split()).strip(" ],")
        super().__init__(f"{call}: {f'{code}: ' if code else ''}{words}")
        self.is_missing = code == _MISSING
        self.is_broken = code not in _HARMLESS


def main() -> None:
    """Serves until the socket closes. Ends without destructors."""
    parser = argparse.ArgumentParser(prog="weight_brokerd.datasystem.objects_child")
    parser.add_argument("--socket", type=int, required=True)
    options = parser.parse_args()
    belong_to_parent()
    with socket.socket(fileno=options.socket) as connection:
        os._exit(_Child(connection).serve())


class _Child:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = Connection(connection, messages.CODEC)
        self._client: Any = None

    def serve(self) -> int:
        """The exit status."""
        while (request := self._connection.receive()) is not None:
            number, message = request
            descriptor: int | None = None
            try:
                answer, descriptor = self._do(message)
            except _EngineError as error:
                answer = messages.Refusal(str(error), error.is_missing, error.is_broken)
            except (OSError, ValueError) as error:
                answer = messages.Refusal(str(error))
            self._connection.close_descriptors()  # the value's memory is its owner's again
            self._connection.answer(number, answer, descriptor)
            if descriptor is not None:
                os.close(descriptor)
            if isinstance(message, messages.Stop):
                return 0
        return 0

    def _do(self, message: messages.Message) -> tuple[messages.Answer, int | None]:
        match message:
            case messages.Connect():
                self._connect(message)
            case messages.Stop():
                self._client = None
            case _ if self._client is None:
                raise ValueError("the first request is Connect")
            case messages.PutObject():
                self._put(message)
            case messages.GetObject(key):
                value = self._get(key)
                return messages.Value(value.size_bytes), value.descriptor
            case messages.ExistsObjects(keys):
                return messages.Existence(tuple(map(bool, self._call("exist", list(keys))))), None
            case messages.DeleteObjects(keys):
                if failed := self._call("delete", list(keys)):
                    raise ValueError(f"delete: the engine returned {failed} as failed, without a reason")
            case _:
                raise ValueError(f"the process for host objects does not do {type(message).__name__}")
        return messages.Done(), None

    def _connect(self, start: messages.Connect) -> None:
        try:
            from yr.datasystem import KVClient
        except ImportError as error:
            raise _EngineError("the datasystem client cannot be loaded", error) from error
        try:
            self._client = KVClient(
                start.worker_host,
                start.worker_port,
                connect_timeout_ms=start.connect_timeout_ms,
                req_timeout_ms=start.request_timeout_ms,
                **start.credentials,
            )
        except (RuntimeError, TypeError) as error:
            raise _EngineError("KVClient", error) from error
        self._call("init")

    def _put(self, request: messages.PutObject) -> None:
        if not self._connection.descriptors:
            raise ValueError("PutObject comes without a value")
        descriptor, size = self._connection.descriptors[0], request.size_bytes
        if os.fstat(descriptor).st_size < size:  # reading behind the end would kill this process
            raise ValueError(f"the value has {os.fstat(descriptor).st_size} bytes instead of {size}")
        (buffer,) = self._create(request)
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as value, memoryview(value) as source:
            target = buffer.MutableData()
            target[:] = source
            del target
        self._call("mset_buffer", [buffer])

    def _create(self, request: messages.PutObject) -> Any:
        try:
            return self._call("mcreate", [request.key], [request.size_bytes], ttl_second=request.ttl_seconds)
        except _EngineError as error:
            if error.is_broken:  # a worker without memory tries until the time is over, and then often says only that
                self._call("exist", [request.key])
                raise ValueError(
                    f"{error}; the worker answers other requests: it has no memory left for {request.size_bytes} bytes"
                ) from error
            raise

    def _get(self, key: str) -> ObjectValue:
        # What waits for a key waits for the whole time limit, so it is looked for first.
        (found,) = self._call("exist", [key])
        buffers = self._call("get_buffers", [key]) if found else [None]
        if buffers[0] is None:
            raise _EngineError("get_buffers", RuntimeError(f"code: [{_MISSING}], msg: [there is no object {key!r}]"))
        return ObjectValue.of(memoryview(buffers[0]))

    def _call(self, method: str, *arguments: object, **options: object) -> Any:
        try:
            return getattr(self._client, method)(*arguments, **options)
        except (RuntimeError, TypeError) as error:
            raise _EngineError(method, error) from error


if __name__ == "__main__":
    main()
