"""A publication that waits until a check of the weights has ended: the process serves meanwhile, other processes wait.

The memory is shared at once, since the weights may change afterwards; the broker learns of it when the check has found
nothing. Weights that fail the check are never announced, and every process that waits loads from disk.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

from weight_broker.drivers.error import DriverError
from weight_broker.errors import BrokerError, PublishRefused
from weight_broker.transfers.waiting import Waiting

if TYPE_CHECKING:
    from weight_broker.transfers.lease import ColdLoadLease
    from weight_broker.transfers.publication import Publication

_logger = logging.getLogger("weight_broker")


class Check(Protocol):
    """Runs beside the load."""

    @property
    def has_ended(self) -> bool: ...

    def damage(self) -> str:
        """What is wrong with the weights that were read; empty if nothing is. Waits for the end of the check."""


class WeightsDamaged(PublishRefused):
    """The weights on disk are not what they should be; the message names the file."""


def announce(publication: Publication, check: Check, lease: ColdLoadLease | None, timeout: float) -> None:
    """Announce the publication now if the check has ended, else when it ends. Raises `WeightsDamaged` and what
    `Publication.announce` raises, as far as that is known before the function returns."""
    if not check.has_ended:
        publication.waiting = Waiting()
        waits = threading.Thread(
            target=_announce_later, args=(publication, check, lease, timeout), name="publish-checked", daemon=True
        )
        try:
            waits.start()
        except RuntimeError:  # the system allows no more threads
            publication.waiting = None
        else:
            return
    _announce(publication, check, lease, timeout)


def _announce(publication: Publication, check: Check, lease: ColdLoadLease | None, timeout: float) -> None:
    damage = check.damage()
    if damage:
        publication.abandon()
        raise WeightsDamaged(damage)
    publication.announce(
        deadline=time.monotonic() + timeout, fencing_token=lease.fencing_token if lease is not None else 0
    )
    if lease is not None:
        lease.fulfilled()


def _announce_later(publication: Publication, check: Check, lease: ColdLoadLease | None, timeout: float) -> None:
    refusal = ""
    try:
        _announce(publication, check, lease, timeout)
        _logger.info("published weight set %s, whose files are whole", publication.key.id)
    except Exception as error:  # noqa: BLE001  # there is no caller left to raise it to
        refusal = f"{type(error).__name__}: {error}"
        if not publication.is_retracted or isinstance(error, WeightsDamaged):
            _logger.warning("%s is loaded but not published: %s", publication.key.model, error)
        if lease is not None:
            with contextlib.suppress(BrokerError, DriverError, OSError, RuntimeError):  # it ends with the session
                lease.give_up(
                    f"publishing failed: {refusal}", unpublishable=isinstance(error, WeightsDamaged)
                )  # fmt: skip
    if publication.waiting is not None:
        publication.waiting.end(refusal)
