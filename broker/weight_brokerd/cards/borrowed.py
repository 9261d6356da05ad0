"""A receiver process reserved for one staged transfer."""

from __future__ import annotations

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.chunks import new_buffer_id
from weight_brokerd.cards.process import AnswerT, CardProcess, EngineFailed


class BorrowedReceiver:
    def __init__(self, child: CardProcess, configuration: CardsConfiguration) -> None:
        self.buffer: ImportRegion | None = None
        """The process's staging buffer, which instances can import; freed when the job has ended."""
        self.keeps_buffer = False
        """An instance still has the buffer mapped although the job has ended, because the daemon ends: the process
        stays until that instance has let go."""
        self.is_busy = False
        """Whether a request may still run without a waiter: the process must then be killed."""
        self._child = child
        self._configuration = configuration

    async def ask(self, request: messages.Request, timeout: float) -> messages.Done:
        """One request at a time. Raises TimeoutError, CardRefused, EngineFailed, CardLost."""
        return await self._request(request, messages.Done, timeout)

    async def make_staging_buffer(self, size: int) -> None:
        """Sets `buffer`. Raises as `ask`."""
        region_id = new_buffer_id()
        request = messages.MakeStagingBuffer(region_id, size)
        answer = await self._request(request, messages.StagingBuffer, self._configuration.import_seconds)
        self.buffer = ImportRegion(region_id, size, answer.export_key)

    async def lend_staging_buffer(self, connection: int) -> None:
        """Let an instance map `buffer`; `connection` is the descriptor of its stage connection. Raises as `ask`."""
        assert self.buffer is not None
        await self._child.lend(self.buffer.region_id, connection)

    async def _request(self, request: messages.Request, answer: type[AnswerT], timeout: float) -> AnswerT:
        self.is_busy = True
        try:
            received = await self._child.request(request, answer, timeout)
        except CardRefused as error:
            self.is_busy = isinstance(error, EngineFailed)
            raise
        self.is_busy = False
        return received
