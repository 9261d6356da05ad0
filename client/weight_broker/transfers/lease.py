"""The cold-load lease: the right and duty of this process to load a weight set from disk."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

from weight_broker.connection.deadline import REQUEST_TIMEOUT_SECONDS
from weight_broker.connection.session import Attachment, Session
from weight_broker.errors import BrokerError, InvalidArgument, LeaseLost, NotAttached

if TYPE_CHECKING:
    from weight_broker.memory.host.memfd import PreparedMemory


class ColdLoadLease:
    """Held by one process for each weight set; the others wait until the holder has published, given up or ended.

    A context manager: a block that ends without `publish(..., lease=lease)` or `give_up`, also by an exception, gives
    the lease up.

    `touched` says whether an earlier source failed half way, so that the tensors have undefined content; `failure` why
    it failed, None if there was none.
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
        failure: str | None = None,
    ) -> None:
        self._attachment = attachment
        self._session = session
        self.weight_set_id = weight_set_id
        self.fencing_token = fencing_token
        self.expires_at = expires_at
        """Seconds since the epoch."""
        self.touched = touched
        self.failure = failure
        self._settled = False
        self._prepared: PreparedMemory | None = None

    def prepare_memory(self, size_bytes: int) -> bool:
        """Allocate memory for publishing about `size_bytes` in the background, while the weights are loaded: the
        waiters get the weights sooner. `acquire_or_load` does so by itself. False if memory is not plentiful:
        publishing allocates then."""
        from weight_broker.memory.host.memfd import prepare

        if size_bytes <= 0:
            raise InvalidArgument("size_bytes", size_bytes, "more than 0")
        self._discard_prepared()
        if not self._settled:
            self._prepared = prepare(size_bytes)
        return self._prepared is not None

    @property
    def prepared(self) -> PreparedMemory | None:
        """The memory of `prepare_memory`. For `BrokerClient.publish`."""
        return self._prepared

    def give_up(
        self, reason: str = "", *, unpublishable: bool = False, timeout: float = REQUEST_TIMEOUT_SECONDS
    ) -> None:
        """End the lease; the next waiter gets it. `unpublishable`: no process can publish these weights, `reason` says
        why, and all waiters and later callers load from disk. Raises `LeaseLost` if the lease has ended already,
        `BrokerUnavailable` if the broker does not answer within `timeout` seconds."""
        from weight_broker.transfers import calls

        self._discard_prepared()
        self._check_session()
        try:
            calls.give_up_lease(
                self._session,
                self.weight_set_id,
                self.fencing_token,
                reason,
                unpublishable=unpublishable,
                timeout=timeout,
            )
        except NotAttached as error:
            raise self._lost() from error
        self._settled = True

    def extend(self, seconds: float | None = None) -> None:
        """The lease then lasts at least `seconds` from now (None: the broker's default). Raises `LeaseLost`."""
        from weight_broker.transfers import calls

        self._check_session()
        try:
            self.expires_at = calls.extend_lease(self._session, self.weight_set_id, self.fencing_token, seconds)
        except NotAttached as error:
            raise self._lost() from error

    def fulfilled(self) -> None:
        """A publication has ended the lease. Called by `BrokerClient.publish`."""
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
        with contextlib.suppress(BrokerError):  # it has ended already, or ends with the broker or at its time limit
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
            f"cold-load lease {self.fencing_token} of weight set {self.weight_set_id!r} ended with its "
            "broker or with the process that held it; load without it, and publish",
            metadata={"weight_set_id": self.weight_set_id, "fencing_token": str(self.fencing_token)},
        )
