"""A card process: `python -m weight_brokerd.cards.child --role sender --device 0 --socket FD`.

It prints nothing, does what comes over the socket, and ends when the other end is closed, whatever it is doing.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from weight_broker import acl
from weight_broker.acl import AclError
from weight_broker.memory.npu import device_id
from weight_brokerd.cards import messages
from weight_brokerd.cards.child_engine import Engine, EngineError
from weight_brokerd.cards.child_memory import NotPossible
from weight_brokerd.cards.child_work import Work
from weight_brokerd.cards.messages import Role
from weight_brokerd.children.connection import Connection, belong_to_parent

THREADS = 16
_STOP_SECONDS = 1.5


def main() -> None:
    """Serves until the socket closes. Ends without destructors: an engine that hangs in one keeps no memory mapped."""
    parser = argparse.ArgumentParser(prog="weight_brokerd.cards.child")
    parser.add_argument("--role", type=Role, required=True)
    parser.add_argument("--device", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True)
    options = parser.parse_args()
    belong_to_parent()
    with socket.socket(fileno=options.socket) as connection:
        os._exit(_Child(connection, options.role, options.device).serve())


class _Child:
    def __init__(self, connection: socket.socket, role: Role, device: int) -> None:
        self._connection = Connection(connection, messages.CODEC)
        self._role = role
        self._device = device

    def serve(self) -> int:
        """The exit status."""
        first = self._connection.receive()
        if first is None:
            return 0
        number, start = first
        if not isinstance(start, messages.Start):
            self._connection.answer(number, messages.Refusal("the first request is Start"))
            return 1
        try:
            work, ready = self._start(start)
        except (AclError, EngineError) as error:
            self._connection.answer(number, messages.Refusal(str(error)))
            return 1
        pool = ThreadPoolExecutor(THREADS, "work", initializer=lambda: acl.load().set_device(self._device))
        self._connection.answer(number, ready)
        while (request := self._connection.receive()) is not None:
            number, message = request
            if isinstance(message, messages.Stop):
                self._stop(work)
                self._connection.answer(number, messages.Done())
                return 0
            pool.submit(self._do, work, number, message)
        return 0

    def _start(self, start: messages.Start) -> tuple[Work, messages.Ready]:
        """Serially, in this thread: the engine's first use of a device must not happen in several."""
        seconds = {}
        at = time.monotonic()
        runtime = acl.load()
        runtime.set_device(self._device)
        identity, soc = device_id(runtime, self._device), runtime.soc_name()
        seconds["set_device"] = time.monotonic() - at
        at = time.monotonic()
        engine = Engine(
            start.worker_host,
            start.worker_port,
            self._device,
            connect_timeout_ms=start.connect_timeout_ms,
            credentials=start.credentials,
        )
        seconds["connect"] = time.monotonic() - at
        at = time.monotonic()
        engine.warm_up(runtime)
        seconds["warm_up"] = time.monotonic() - at
        ready = messages.Ready(runtime.bare_tgid(), identity, soc, seconds)
        return Work(self._role, self._device, runtime, engine), ready

    def _do(self, work: Work, number: int, message: messages.Message) -> None:
        answer: messages.Answer
        try:
            answer = work.do(message)  # type: ignore[arg-type]  # what is no request is refused there
        except (AclError, EngineError, NotPossible) as error:
            answer = messages.Refusal(str(error))
        except BaseException as error:  # noqa: BLE001 - a defect: the daemon is to hear of it rather than to wait
            answer = messages.Refusal(f"a defect in the card process: {error!r}", started=True)
        self._connection.answer(number, answer)

    def _stop(self, work: Work) -> None:
        """Gives back what can be given back soon; the end of the process gives back the rest."""

        def close() -> None:
            acl.load().set_device(self._device)
            try:
                work.close()
            except (AclError, EngineError):
                return

        closing = threading.Thread(target=close, name="stop", daemon=True)
        closing.start()
        closing.join(_STOP_SECONDS)


if __name__ == "__main__":
    main()
