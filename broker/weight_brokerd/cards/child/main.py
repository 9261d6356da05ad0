"""A card process: `python -m weight_brokerd.cards.child.main --kind npu --role sender --device 0 --socket FD`.

It prints nothing, carries out the requests on the socket, and ends when the daemon closes the socket, also during a
request; but not before its staging buffers are unmapped by every instance.
"""

from __future__ import annotations

import argparse
import importlib
import os
import socket
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from weight_broker.drivers.error import DriverError
from weight_brokerd.cards import messages
from weight_brokerd.cards.child.borrowers import Borrowers
from weight_brokerd.cards.child.engine import EngineError
from weight_brokerd.cards.child.memory import NotPossible
from weight_brokerd.cards.messages import Role
from weight_brokerd.processes.connection import Connection, belong_to_parent

THREADS = 16
_STOP_SECONDS = 1.5


class CardWork(Protocol):
    """Carries out the requests of a card process; called from several threads, each of which uses the card."""

    def do(self, request: messages.Request) -> messages.Answer:
        """Raises DriverError, EngineError or NotPossible if nothing was done; RequestRefused says what started."""

    def unmap_all_but(self, kept: Collection[str]) -> None:
        """Unmaps the regions of instances; `kept` are staging buffers. Raises DriverError, EngineError."""

    def close(self) -> None:
        """Unmaps and frees all that can be. Raises DriverError, EngineError."""


class Card(Protocol):
    """A card of any kind."""

    def use(self) -> None:
        """Makes the card the calling thread's device. Raises DriverError."""

    def start(self, start: messages.Start) -> tuple[CardWork, messages.Ready]:
        """Opens the card. Raises DriverError, EngineError."""


OpenCard = Callable[[Role, int], Card]


def main() -> None:
    """Serves until the socket closes. Ends without destructors: an engine that hangs in one keeps no memory mapped."""
    parser = argparse.ArgumentParser(prog="weight_brokerd.cards.child.main")
    parser.add_argument("--kind", required=True, help="a module beside this one that has open_card")
    parser.add_argument("--role", type=Role, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True)
    options = parser.parse_args()
    belong_to_parent()
    with socket.socket(fileno=options.socket) as connection:
        os._exit(_Child(connection, _card(options.kind, options.role, options.device)).serve())


def _card(kind: str, role: Role, device: int) -> Card:
    """The card, opened by the module of its kind. Drivers of other kinds are not imported."""
    open_card: OpenCard = importlib.import_module(f"weight_brokerd.cards.child.{kind}").open_card
    return open_card(role, device)


class _Child:
    def __init__(self, connection: socket.socket, card: Card) -> None:
        self._connection = Connection(connection, messages.CODEC)
        self._card = card
        self._borrowers = Borrowers()

    def serve(self) -> int:
        """The exit status."""
        first = self._connection.receive()
        if first is None:
            return 0
        number, start = first
        if not isinstance(start, messages.Start):
            self._connection.answer(number, messages.RequestRefused("the first request is Start"))
            return 1
        try:
            work, ready = self._card.start(start)
        except (DriverError, EngineError) as error:
            self._connection.answer(number, messages.RequestRefused(str(error)))
            return 1
        pool = ThreadPoolExecutor(THREADS, "work", initializer=self._card.use)
        self._connection.answer(number, ready)
        while (request := self._connection.receive()) is not None:
            number, message = request
            match message:
                case messages.Stop():
                    self._stop(work)
                    self._connection.answer(number, messages.Done())
                    return 0
                case messages.LendStagingBuffer(region_id):
                    self._lend(number, region_id)
                    continue
                case messages.CloseRegion(region_id):
                    self._borrowers.returned(region_id)
            pool.submit(self._do, work, number, message)
        if self._borrowers.buffers:
            self._outlive(work, pool)
        return 0

    def _lend(self, number: int, region_id: str) -> None:
        if not self._connection.descriptors:
            self._connection.answer(number, messages.RequestRefused("no stage connection came with the request"))
            return
        self._borrowers.lend(region_id, self._connection.descriptors.pop())
        self._connection.answer(number, messages.Done())

    def _outlive(self, work: CardWork, pool: ThreadPoolExecutor) -> None:
        """Without the daemon: begins nothing more, unmaps what other instances own, and waits for the borrowers."""
        pool.shutdown(wait=False, cancel_futures=True)
        kept = tuple(self._borrowers.buffers)

        def unmap() -> None:
            pool.shutdown(wait=True)
            with suppress(DriverError, EngineError):
                self._card.use()
                work.unmap_all_but(kept)

        threading.Thread(target=unmap, name="unmap", daemon=True).start()
        self._borrowers.wait()

    def _do(self, work: CardWork, number: int, message: messages.Message) -> None:
        answer: messages.Answer
        try:
            answer = work.do(message)  # type: ignore[arg-type]  # what is no request is refused there
        except (DriverError, EngineError, NotPossible) as error:
            answer = messages.RequestRefused(str(error), by_engine=isinstance(error, EngineError))
        except BaseException as error:  # noqa: BLE001 - of any kind: the daemon must get an answer
            answer = messages.RequestRefused(f"a defect in the card process: {error!r}", started=True)
        self._connection.answer(number, answer)

    def _stop(self, work: CardWork) -> None:
        """Unmaps and frees what can be within _STOP_SECONDS; the end of the process frees the rest."""

        def close() -> None:
            try:
                self._card.use()
                work.close()
            except (DriverError, EngineError):
                return

        closing = threading.Thread(target=close, name="stop", daemon=True)
        closing.start()
        closing.join(_STOP_SECONDS)


if __name__ == "__main__":
    main()
