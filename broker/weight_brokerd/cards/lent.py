"""A receiver that one transfer has to itself."""

from __future__ import annotations

from weight_brokerd.cards import messages
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.cards.errors import CardRefused
from weight_brokerd.cards.messages import ImportRegion
from weight_brokerd.cards.plan.chunks import new_bucket_id
from weight_brokerd.cards.process import AnswerT, CardProcess, EngineFailed


class Lent:
    """A card process as a job sees it."""

    def __init__(self, child: CardProcess, configuration: CardsConfiguration) -> None:
        self.bucket: ImportRegion | None = None
        """Memory of the process's own that instances can import; gone when the job has ended."""
        self.is_busy = False
        """Whether the process may be doing something that nobody waits for any more: it is to be killed."""
        self._child = child
        self._configuration = configuration

    async def ask(self, request: messages.Request, timeout: float) -> messages.Done:
        """One request at a time. Raises TimeoutError, CardRefused, EngineFailed, CardLost."""
        return await self._request(request, messages.Done, timeout)

    async def make_bucket(self, size: int) -> None:
        """Sets `bucket`. Raises as `ask`."""
        region_id = new_bucket_id()
        request = messages.MakeBucket(region_id, size)
        made = await self._request(request, messages.Bucket, self._configuration.import_seconds)
        self.bucket = ImportRegion(region_id, size, made.export_key)

    async def _request(self, request: messages.Request, answer: type[AnswerT], timeout: float) -> AnswerT:
        self.is_busy = True
        try:
            answered = await self._child.request(request, answer, timeout)
        except CardRefused as error:
            self.is_busy = isinstance(error, EngineFailed)
            raise
        self.is_busy = False
        return answered
