"""Host objects of the datasystem: values under keys, which any client of the cluster can read.

One child process has the client. It does one request at a time, because the client holds the interpreter. A request
that is not done in time costs the process, and the next one starts a fresh process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import structlog

from weight_brokerd.cards.tasks import uninterrupted
from weight_brokerd.children.environment import inherited
from weight_brokerd.children.process import ChildProcess, Received, spawn
from weight_brokerd.datasystem import object_messages as messages
from weight_brokerd.datasystem.errors import (
    ObjectError,
    ObjectNotFound,
    ObjectRefused,
    ObjectsLost,
    ObjectsTimeout,
    ObjectsUnavailable,
)
from weight_brokerd.datasystem.object_value import ObjectValue

log = structlog.get_logger()
AnswerT = TypeVar("AnswerT", messages.Done, messages.Value, messages.Existence)
MAXIMUM_KEYS = 10_000
"""In one request; the engine takes no more."""
_KEY = re.compile(r"[a-zA-Z0-9\-_!@#%^*()+=:;]{1,255}")
_CHECK_BYTES = 1 << 20
"""More than what the engine sends in a message instead of shared memory."""
_CHECK_TTL_SECONDS = 60
_STOP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ObjectsConfiguration:
    """How the process for host objects reaches the worker, and how long it may take. Times are in seconds."""

    worker_host: str
    worker_port: int
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """See `CardsConfiguration.credentials`."""
    log_directory: Path | None = None
    """Where the engine's client logs; None: where it does by itself."""
    start_seconds: float = 30.0
    """For a process to start and to connect."""
    request_seconds: float = 20.0
    """For a request that says nothing else. The engine itself gives up after a third of it, and then says why."""
    exit_seconds: float = 10.0
    """For a killed process to be gone."""
    idle_seconds: float = 300.0
    """How long the process stays when nothing is asked."""

    def environment(self) -> dict[str, str]:
        """All variables of the process."""
        logs = {"DATASYSTEM_CLIENT_LOG_DIR": str(self.log_directory)} if self.log_directory is not None else {}
        return inherited() | logs


class HostObjects:
    """Starts its process when it is needed. Every request has a `timeout` in seconds, and raises an `ObjectError` if it
    fails: ObjectsTimeout, ObjectsUnavailable, ObjectsLost, ObjectRefused."""

    def __init__(self, configuration: ObjectsConfiguration) -> None:
        self.problem = ""
        """Why the last request did not reach the worker, in the engine's words; empty if it did."""
        self._configuration = configuration
        self._child: ChildProcess[messages.Message] | None = None
        self._turn = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def pid(self) -> int:
        """The process; 0 if there is none now."""
        return self._child.pid if self._child is not None and not self._child.has_ended else 0

    async def put(
        self,
        key: str,
        value: ObjectValue | bytes | bytearray | memoryview,
        *,
        ttl_seconds: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Stores a value of at least one byte, in place of an earlier one. Whoever reads gets all of it or the earlier
        one. `ttl_seconds`: the worker forgets it after so long; 0: never."""
        _check_keys([key])
        if not isinstance(value, ObjectValue):
            with ObjectValue.of(value) as owned:
                await self.put(key, owned, ttl_seconds=ttl_seconds, timeout=timeout)
            return
        if value.size_bytes < 1:
            raise ValueError(f"the value of {key!r} is empty; the datasystem stores at least one byte")
        request = messages.PutObject(key, value.size_bytes, ttl_seconds)
        await self._ask(request, messages.Done, timeout, value.descriptor)

    async def get(self, key: str, *, timeout: float | None = None) -> ObjectValue:
        """A copy of the value, which the caller closes. Raises ObjectNotFound too."""
        _check_keys([key])
        received = await self._exchange(messages.GetObject(key), messages.Value, timeout)
        if len(received.descriptors) != 1:
            received.close()
            raise ObjectsLost("the process for host objects sends a value without its memory")
        assert isinstance(received.message, messages.Value)
        return ObjectValue(received.descriptors.pop(), received.message.size_bytes)

    async def exists(self, keys: Sequence[str], *, timeout: float | None = None) -> list[bool]:
        """Whether each key has a value now."""
        _check_keys(keys)
        answer = await self._ask(messages.ExistsObjects(tuple(keys)), messages.Existence, timeout)
        return list(answer.found)

    async def delete(self, keys: Sequence[str], *, timeout: float | None = None) -> None:
        """Forgets values; keys that have none are fine."""
        _check_keys(keys)
        await self._ask(messages.DeleteObjects(tuple(keys)), messages.Done, timeout)

    async def check(self, *, timeout: float | None = None) -> dict[str, float]:
        """Stores, reads, compares and deletes an object of 1 MiB: the seconds of each step. Raises ObjectError."""
        limit = self._configuration.request_seconds if timeout is None else timeout
        deadline = time.monotonic() + limit
        key, content = f"weight-broker-check-{secrets.token_hex(16)}", os.urandom(_CHECK_BYTES)
        seconds: dict[str, float] = {}

        def left(step: str, begun: float) -> float:
            seconds[step] = time.monotonic() - begun
            return max(0.0, deadline - time.monotonic())

        at = time.monotonic()
        await self.put(key, content, ttl_seconds=_CHECK_TTL_SECONDS, timeout=limit)
        remaining, at = left("put", at), time.monotonic()
        with await self.get(key, timeout=remaining) as value:
            if value.read() != content:
                raise ObjectError("the datasystem gave other bytes back than it was given")
        remaining, at = left("get", at), time.monotonic()
        await self.delete([key], timeout=remaining)
        remaining = left("delete", at)
        if await self.exists([key], timeout=remaining) != [False]:
            raise ObjectError("the datasystem still has an object that was deleted")
        return seconds

    async def close(self) -> None:
        """Ends the process; a request that runs is lost. Idempotent."""
        self._is_closed = True
        if self._idle is not None:
            self._idle.cancel()
        if self._turn.locked():
            await self._kill()
        async with self._turn:
            await self._end()

    # The process

    async def _ask(
        self, request: messages.Request, kind: type[AnswerT], timeout: float | None, descriptor: int | None = None
    ) -> AnswerT:
        received = await self._exchange(request, kind, timeout, descriptor)
        received.close()
        assert isinstance(received.message, kind)
        return received.message

    async def _exchange(
        self,
        request: messages.Request,
        kind: type[messages.Answer],
        timeout: float | None,
        descriptor: int | None = None,
    ) -> Received[messages.Message]:
        limit = self._configuration.request_seconds if timeout is None else timeout
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise ObjectsTimeout(f"other requests for host objects took {limit:g} s; this one was not begun") from None
        try:
            return await self._in_turn(request, kind, deadline, limit, descriptor)
        finally:
            self._turn.release()
            if self._idle is not None:
                self._idle.cancel()
            if not self._is_closed:
                self._idle = loop.call_later(self._configuration.idle_seconds, self._end_if_idle)

    async def _in_turn(
        self,
        request: messages.Request,
        kind: type[messages.Answer],
        deadline: float,
        limit: float,
        descriptor: int | None,
    ) -> Received[messages.Message]:
        name = type(request).__name__
        try:
            async with asyncio.timeout_at(deadline):
                child = await self._ready()
                left = deadline - asyncio.get_running_loop().time()
                received = await child.exchange(request, left, descriptor)
        except TimeoutError:
            await uninterrupted(self._kill())
            self.problem = f"{name} was not done within {limit:g} s; the process for host objects was killed"
            raise ObjectsTimeout(self.problem) from None
        except ObjectError as error:
            self.problem = str(error)
            raise
        except BaseException:  # the request goes on there, before any other
            await uninterrupted(self._kill())
            raise
        answer = received.message
        if isinstance(answer, kind):
            self.problem = ""
            return received
        received.close()
        if not isinstance(answer, messages.Refusal):
            await uninterrupted(self._kill())
            raise ObjectsLost(f"the process for host objects answers {name} with {answer!r}")
        self.problem = answer.words if answer.is_broken else ""
        if answer.is_broken:
            await uninterrupted(self._kill())
            raise ObjectsUnavailable(answer.words)
        raise (ObjectNotFound if answer.is_missing else ObjectRefused)(answer.words)

    async def _ready(self) -> ChildProcess[messages.Message]:
        """A process that is connected. Raises ObjectsUnavailable, or TimeoutError after `start_seconds`."""
        if self._is_closed:
            raise ObjectsUnavailable("the daemon ends")
        if self._child is not None and not self._child.has_ended:
            return self._child
        configuration = self._configuration
        await self._look_for_worker()
        process, connection = await spawn(
            "weight_brokerd.datasystem.objects_child", environment=configuration.environment()
        )
        child = ChildProcess(
            "the process for host objects",
            process,
            connection,
            messages.CODEC,
            exit_seconds=configuration.exit_seconds,
            lost=ObjectsLost,
        )
        self._child = child
        if self._is_closed:
            await self._kill()
            raise ObjectsUnavailable("the daemon ends")
        begun = time.monotonic()
        connect = messages.Connect(
            configuration.worker_host,
            configuration.worker_port,
            int(configuration.start_seconds * 500),
            int(configuration.request_seconds * 1000 / 3),
            dict(configuration.credentials),
        )
        try:
            received = await child.exchange(connect, configuration.start_seconds)
        except ObjectsLost as error:
            raise ObjectsUnavailable(str(error)) from error
        received.close()
        if isinstance(received.message, messages.Refusal):
            await self._kill()
            raise ObjectsUnavailable(received.message.words)
        log.info("objects_process_started", pid=child.pid, seconds=round(time.monotonic() - begun, 3))
        return child

    async def _look_for_worker(self) -> None:
        """The engine would try for as long as it may."""
        host, port = self._configuration.worker_host, self._configuration.worker_port
        try:
            _, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            why = error.strerror or str(error)
            raise ObjectsUnavailable(f"no datasystem worker answers at {host}:{port}: {why}") from error
        writer.close()

    async def _kill(self) -> None:
        child, self._child = self._child, None
        if child is not None and not await child.kill():
            log.error("objects_process_does_not_end", pid=child.pid)

    def _end_if_idle(self) -> None:
        if not self._turn.locked():
            self._ending = asyncio.get_running_loop().create_task(self._end_in_turn())

    async def _end_in_turn(self) -> None:
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        """Politely: the worker then forgets the client at once."""
        if self._child is not None and not self._child.has_ended:
            with contextlib.suppress(TimeoutError, ObjectsLost):
                (await self._child.exchange(messages.Stop(), _STOP_SECONDS)).close()
        await self._kill()


def _check_keys(keys: Sequence[str]) -> None:
    if not 1 <= len(keys) <= MAXIMUM_KEYS:
        raise ValueError(f"{len(keys)} keys; the datasystem takes from 1 to {MAXIMUM_KEYS}")
    for key in keys:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key: 1 to 255 letters, digits or any of -_!@#%^*()+=:;")
