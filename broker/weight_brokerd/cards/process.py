"""A card process, seen from the daemon's loop."""

from __future__ import annotations

import asyncio
import socket
from typing import TypeVar

import structlog

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardLost, CardRefused, CardUnavailable, EngineRefused
from weight_brokerd.cards.messages import Role
from weight_brokerd.processes.child import ChildProcess, spawn
from weight_brokerd.processes.tasks import uninterrupted

log = structlog.get_logger()
MODULE = "weight_brokerd.cards.child.main"
AnswerT = TypeVar("AnswerT", bound=messages.Answer)


class EngineFailed(CardRefused):
    """The engine failed after it had begun. It may go on writing: the process must be killed."""


class CardProcess(ChildProcess[messages.Message]):
    """One child, with its requests and their errors. `pid` is its pid in the daemon's namespace."""

    def __init__(
        self,
        role: Role,
        device: int,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        configuration: CardsConfiguration,
    ) -> None:
        super().__init__(
            f"the {role} of device {device}",
            process,
            connection,
            messages.CODEC,
            exit_seconds=configuration.exit_seconds,
            lost=CardLost,
        )
        self.role = role
        self.device = device
        self.ready = messages.Ready(0, "", "", {})
        self.lent: set[str] = set()
        """Its staging buffers that instances may have mapped. Do not kill it before they are returned."""
        self._configuration = configuration

    @classmethod
    async def start(cls, role: Role, device: int, configuration: CardsConfiguration) -> CardProcess:
        """Start a process; returns when it serves. Raises CardUnavailable with the driver's or the engine's words."""
        try:
            process, ours = await spawn(
                MODULE,
                f"--kind={configuration.kind}",
                f"--role={role}",
                f"--device={device}",
                environment=configuration.child_environment(),
            )
        except OSError as error:  # the daemon has no descriptor, process or memory left
            raise CardUnavailable(f"the {role} of device {device} cannot be started: {error}") from error
        child = cls(role, device, process, ours, configuration)
        first = messages.Start(
            configuration.worker_host,
            configuration.worker_port,
            int(configuration.start_seconds * 500),
            dict(configuration.credentials),
        )
        try:
            child.ready = await child.request(first, messages.Ready, configuration.start_seconds)
        except BaseException as error:
            await uninterrupted(child.kill())
            if isinstance(error, TimeoutError):
                raise CardUnavailable(
                    f"the {role} of device {device} did not start within {configuration.start_seconds:g} s"
                ) from None
            if isinstance(error, (CardRefused, CardLost)):
                raise CardUnavailable(f"the {role} of device {device} does not start: {error}") from error
            raise
        log.info("card_process_started", role=role, device=device, pid=child.pid, seconds=child.ready.seconds)
        return child

    async def request(
        self, request: messages.Request, answer: type[AnswerT], timeout: float, descriptor: int | None = None
    ) -> AnswerT:
        """Sends a request and waits. Raises TimeoutError (the child goes on), CardRefused, EngineFailed, CardLost."""
        exchanged = await self.exchange(request, timeout, descriptor)
        exchanged.close()
        received = exchanged.message
        if isinstance(received, messages.RequestRefused):
            if received.started:
                raise EngineFailed(received.words)
            raise (EngineRefused if received.by_engine else CardRefused)(received.words)
        if not isinstance(received, answer):
            raise CardLost(f"{self.name} answers {received!r}")
        return received

    async def ask(self, request: messages.Request, timeout: float | None = None) -> messages.Done:
        """`request`, for requests whose answer is Done."""
        return await self.request(request, messages.Done, timeout or self._configuration.request_seconds)

    async def lend(self, region_id: str, connection: int) -> None:
        """Let an instance map a staging buffer until it is `returned`; `connection` is the descriptor of its stage
        connection. Raises as `request`."""
        self.lent.add(region_id)
        request = messages.LendStagingBuffer(region_id)
        await self.request(request, messages.Done, self._configuration.request_seconds, connection)

    def returned(self, region_id: str) -> None:
        """No instance has the staging buffer mapped. Idempotent."""
        self.lent.discard(region_id)

    async def stop(self) -> bool:
        """Ask the process to free everything and end; kill it if it does not. False: it has not ended. A process whose
        staging buffer an instance still has mapped is left alone: it ends after that instance."""
        if self.lent and not self.has_ended:
            log.warning("card_process_left", role=self.role, device=self.device, pid=self.pid, lent=sorted(self.lent))
            self.leave()
            return False
        try:
            await self.ask(messages.Stop(), self._configuration.stop_seconds)
        except (TimeoutError, CardRefused, CardLost):
            return await self.kill()
        return await self.kill()
