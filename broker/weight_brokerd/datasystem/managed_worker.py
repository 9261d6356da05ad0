"""A datasystem worker that the broker starts, watches and ends: its own metastore, on 127.0.0.1, for this host alone.

Failures show in `problem` and in the log. The broker itself goes on, because host memory needs no worker. The worker is
started again after a while: an operator may free memory or a port, or install the wheel, without a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from weight_broker.drivers.available_memory import available_bytes
from weight_brokerd.config.errors import StartError
from weight_brokerd.config.settings import DatasystemSettings
from weight_brokerd.datasystem import greeting, ports, worker_command
from weight_brokerd.datasystem.leftover import WorkerDirectory
from weight_brokerd.datasystem.worker_command import HOST, MAXIMUM_SOCKET_DIRECTORY_BYTES, NoWheelError, WorkerFiles
from weight_brokerd.processes.tasks import uninterrupted

log = structlog.get_logger()
READY_SECONDS = 90.0
"""How long a worker may take to serve; it is killed after that."""
RETRY_SECONDS = (0.5, 30.0)
"""Wait before the worker is started again: the first and the longest."""
STEADY_SECONDS = 60.0
"""A worker that ran for this long is started again after the first wait."""
STOP_SECONDS = 4.0
"""For an orderly end; then the worker is killed."""
KILL_SECONDS = 5.0
"""For a killed worker to be gone."""
ASK_SECONDS = 1.0
"""Between an answer of the worker and the next question."""
MAXIMUM_UNANSWERED = 3
"""Questions in a row without an answer; then the worker is replaced."""
SOON_SECONDS = 3.0
"""A publication waits for a start that is not later."""
HANGS = "the datasystem worker does not answer; it is replaced unless it answers soon"
_POLL_SECONDS = 0.05
_OUTPUT_BYTES = 16 << 10


class _NotStartedError(Exception):
    """The worker does not run; the text is for operators."""


class _HungError(_NotStartedError):
    """The worker runs, but does not answer."""


class ManagedWorker:
    """At most one worker at a time. All methods are called on the loop."""

    is_managed = True

    def __init__(
        self, settings: DatasystemSettings, state_directory: Path, *, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """`on_change` is called when the worker begins to serve, and when it has ended or could not be started."""
        self.problem = "the datasystem worker has not been started yet"
        """Why the worker does not serve, and what to do; empty while it serves."""
        self.pid = 0
        """The worker's process; 0 while there is none."""
        self._on_change = on_change
        self._ready = asyncio.Event()
        self._settled = asyncio.Event()
        self._settings = settings
        self._files = WorkerFiles(
            Path(settings.directory) if settings.directory else state_directory / "datasystem",
        )
        self._directory: WorkerDirectory | None = None
        self._port = self._metastore_port = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self._ready.is_set()

    async def start(self) -> tuple[str, int]:
        """Begin to start the worker; returns the address where it will serve after some seconds (`wait_ready`). Raises
        StartError if its directory is unusable."""
        longest = len(os.fsencode(self._files.sockets))
        if longest > MAXIMUM_SOCKET_DIRECTORY_BYTES:
            room = MAXIMUM_SOCKET_DIRECTORY_BYTES - longest + len(os.fsencode(self._files.directory))
            raise StartError(
                f"datasystem.directory: {self._files.directory} is too long for the worker's sockets in it; set one of "
                f"at most {room} bytes"
            )
        self._directory = WorkerDirectory(self._files.directory)
        try:
            self._port = self._settings.managed_port or ports.choose(HOST, but=self._settings.metastore_port)
            self._metastore_port = self._settings.metastore_port or ports.choose(HOST, but=self._port)
        except OSError as error:
            raise StartError(f"there is no free port on {HOST} for the datasystem worker: {error.strerror}") from error
        self._task = asyncio.create_task(self._supervise(self._directory))
        return HOST, self._port

    async def wait_ready(self, seconds: float) -> bool:
        """Wait up to `seconds` until the worker serves; False if it does not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), seconds)
        return self.is_ready

    async def settled(self) -> None:
        """Returns when the worker serves, or is not expected to serve soon."""
        if self._task is not None:
            await self._settled.wait()

    async def look(self) -> None:
        """Nothing to do: the worker is of this broker's own wheel."""

    async def close(self) -> None:
        """End the worker, in at most STOP_SECONDS + KILL_SECONDS. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._directory is not None:
            self._directory.close()

    async def _supervise(self, directory: WorkerDirectory) -> None:
        first, most = RETRY_SECONDS
        wait = first
        while True:
            begun = time.monotonic()
            try:
                await self._run(directory)
            except (_NotStartedError, NoWheelError) as error:
                words = str(error)
            except OSError as error:
                words = f"the datasystem worker cannot be started: {error}"
            if time.monotonic() - begun > STEADY_SECONDS:
                wait = first
            self._set_problem(words, wait)
            await asyncio.sleep(wait)
            wait = min(2 * wait, most)

    async def _run(self, directory: WorkerDirectory) -> None:
        """One worker from its start to its end; always raises."""
        if not await directory.end_leftover(KILL_SECONDS):
            raise _NotStartedError(f"the worker that an earlier broker left in {directory.path} does not end")
        command = worker_command.command(
            worker_command.wheel(),
            self._settings,
            self._files,
            port=self._port,
            metastore_port=self._metastore_port,
        )
        self._check_ports()
        self._check_memory()
        for path in self._files.temporary:
            shutil.rmtree(path, ignore_errors=True)
        with self._files.output.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self._files.directory,
                env=worker_command.environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # signals of the terminal are for the broker, which ends the worker in time
            )
        try:
            with contextlib.suppress(OSError):  # the worker has ended already
                directory.record(process.pid)
            self.pid = process.pid
            self._settled.clear()
            await self._watch(process)
        except _HungError:
            process.kill()  # it would not notice a polite signal
            raise
        finally:
            self.pid = 0
            self._ready.clear()
            if await uninterrupted(_end(process)):
                directory.forget()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        begun = time.monotonic()
        ended = asyncio.create_task(process.wait())
        try:
            while not self._files.ready.exists() and not ended.done():
                if time.monotonic() - begun > READY_SECONDS:
                    raise _NotStartedError(
                        f"the datasystem worker did not serve within {READY_SECONDS:g} s; see {self._files.logs}"
                    )
                await asyncio.wait({ended}, timeout=_POLL_SECONDS)
            if not ended.done():
                self._set_ready()
                log.info(
                    "datasystem_worker_ready",
                    pid=process.pid,
                    address=f"{HOST}:{self._port}",
                    seconds=round(time.monotonic() - begun, 2),
                )
            await self._ask_until(ended)
            status = await asyncio.shield(ended)
        finally:
            ended.cancel()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        words = self._last_words()
        raise _NotStartedError(
            f"the datasystem worker {how}" + (f": {words}" if words else f"; see {self._files.logs}")
        )

    async def _ask_until(self, ended: asyncio.Task[int]) -> None:
        """Asks the worker whether it runs, until it has ended. Raises _HungError."""
        unanswered = 0
        while not ended.done():
            await asyncio.wait({ended}, timeout=ASK_SECONDS)
            if ended.done():
                return
            if await greeting.answers(HOST, self._port):
                if unanswered and not ended.done():
                    self._set_ready()
                unanswered = 0
                continue
            unanswered += 1
            if unanswered == MAXIMUM_UNANSWERED:
                raise _HungError(f"the datasystem worker hung and was killed: no answer to {unanswered} questions")
            if unanswered == 1:
                self._ready.clear()
                self._set_problem(HANGS, greeting.ANSWER_SECONDS)

    def _set_ready(self) -> None:
        self.problem = ""
        self._ready.set()
        self._settled.set()
        self._on_change()

    def _check_ports(self) -> None:
        for setting, configured, port in (
            ("managed_port", self._settings.managed_port, self._port),
            ("metastore_port", self._settings.metastore_port, self._metastore_port),
        ):
            if not ports.is_free(HOST, port):
                fix = f"end that process, or set datasystem.{setting} to another port or to 0"
                fix = fix if configured else "end that process"
                raise _NotStartedError(f"another process has port {port} on {HOST} (datasystem.{setting}): {fix}")

    def _check_memory(self) -> None:
        """The worker takes memory as objects come; a process that runs out of memory then is killed."""
        available, wanted = available_bytes(), self._settings.shared_memory_mb
        if available is not None and available < wanted << 20:
            raise _NotStartedError(
                f"datasystem.shared_memory_mb is {wanted}, but the host or the broker's control group has "
                f"{available >> 20} MiB left: lower the setting, or free memory"
            )

    def _last_words(self) -> str:
        """The first line of the worker's output that looks like an error, else its last line."""
        try:
            written = self._files.output.read_bytes()[-_OUTPUT_BYTES:].decode(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in written.splitlines() if line.strip()]
        errors = [line for line in lines if "| E |" in line or "error" in line.lower()]
        return (errors or lines[-1:] or [""])[0].rpartition(" | ")[2].strip()

    def _set_problem(self, words: str, retry_seconds: float) -> None:
        if words != self.problem:
            log.error("datasystem_worker_failed", problem=words, retry_seconds=retry_seconds)
        self.problem = words
        if retry_seconds > SOON_SECONDS:
            self._settled.set()
        else:
            self._settled.clear()
        self._on_change()


async def _end(process: asyncio.subprocess.Process) -> bool:
    """Terminate, then kill; False if the process has not ended."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        if process.returncode is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
            return True
    log.error("datasystem_worker_not_ended", pid=process.pid)
    return False
