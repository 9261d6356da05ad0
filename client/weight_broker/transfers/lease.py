"""The cold-load lease: the right and duty of this process to load a weight set from disk."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import BrokerError, InvalidArgument, LeaseLost, NotAttached

if TYPE_CHECKING:
    from weight_broker.memory.host.memfd import PreparedMemory


class ColdLoadLease:
    """Held by one process for each weight set; the others wait until it has published, given up or died.

    A context manager: a block that is left without `publish(..., lease=lease)` or `give_up`, also by an exception,
    gives the lease up.

    `touched` says whether an earlier source failed half way, so that the tensors have undefined content.
    """

    def __init__(
        self,
        attachment: Attachment,
        session: Session,
        *,
        weight_set_id: str,
        fencing_token: int,
        expires_at: float,
        touched: bool,
    ) -> None:
        self._attachment = attachment
        self._session = session
        self.weight_set_id = weight_set_id
        self.fencing_token = fencing_token
        self.expires_at = expires_at
        """Seconds since the epoch."""
        self.touched = touched
        self._settled = False
        self._prepared: PreparedMemory | None = None

    def prepare_memory(self, size_bytes: int) -> bool:
        """Has the kernel give out memory for publishing about `size_bytes` of host memory with this lease, in the
        background, while they are being loaded: whoever waits for the weights gets them sooner. `acquire_or_load` does
        so by itself. False if there is not plenty of memory: publishing asks for it in its own time then."""
        from weight_broker.memory.host.memfd import prepare

        if size_bytes <= 0:
            raise InvalidArgument("size_bytes", size_bytes, "more than 0")
        self._discard_prepared()
        if not self._settled:
            self._prepared = prepare(size_bytes)
        return self._prepared is not None

    @property
    def prepared(self) -> PreparedMemory | None:
        """What `prepare_memory` asked for. For `BrokerClient.publish`."""
        return self._prepared

    def give_up(self, reason: str = "", *, unpublishable: bool = False) -> None:
        """Ends the lease so that the next waiter is told to load. If nobody can publish the weights (`unpublishable`,
        and `reason` says why), all waiters are told to, and whoever asks later. Raises `LeaseLost` if it had ended
        already."""
        from weight_broker.transfers import calls

        self._discard_prepared()
        self._check_session()
        try:
            calls.give_up_lease(
                self._session, self.weight_set_id, self.fencing_token, reason, unpublishable=unpublishable
            )
        except NotAttached as error:
            raise self._lost() from error
        self._settled = True

    def extend(self, seconds: float | None = None) -> None:
        """Makes the lease last at least `seconds` from now (the broker's default if None). Raises `LeaseLost`."""
        from weight_broker.transfers import calls

        self._check_session()
        try:
            self.expires_at = calls.extend_lease(self._session, self.weight_set_id, self.fencing_token, seconds)
        except NotAttached as error:
            raise self._lost() from error

    def fulfilled(self) -> None:
        """Notes that a publication with this lease has ended it. Called by `BrokerClient.publish`."""
        self._settled = True
        self._discard_prepared()

    def __enter__(self) -> ColdLoadLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard_prepared()
        if self._settled:
            return
        with contextlib.suppress(BrokerError):  # it has ended, or does so with the broker or in its own time
            self.give_up("nothing was published" if kind is None else f"the loader raised {kind.__name__}")

    def __repr__(self) -> str:
        return f"ColdLoadLease(weight_set_id={self.weight_set_id!r}, fencing_token={self.fencing_token})"

    def _discard_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.close()

    def _check_session(self) -> None:
        if not self._attachment.is_current(self._session):
            raise self._lost()

    def _lost(self) -> BrokerError:
        return LeaseLost(
            f"cold-load lease {self.fencing_token} of weight set {self.weight_set_id!r} ended with the broker or the "
            "process that it was granted by or to",
            metadata={"weight_set_id": self.weight_set_id, "fencing_token": str(self.fencing_token)},
        )
