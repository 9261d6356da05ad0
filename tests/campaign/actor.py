"""The program of one instance of a campaign: actor CONNECTION SWITCH PROCESS MEMORY CARD HISTORY.

It does what comes in through the connection, one operation after the other, and writes each down before and after. The
switch cuts its connections to the broker, whatever it does meanwhile.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from campaign.history import Recorder, now
from campaign.operations import OPERATIONS, Instance
from campaign.plan import Step
from campaign.weights import memory_of
from weight_broker.errors import BrokerError

HANG_UPS = {b"a": "attach.sock", b"g": "broker.sock"}
"""What the switch can cut."""


class Actor:
    """Performs steps and records them."""

    def __init__(self, process: str, instance: Instance, recorder: Recorder) -> None:
        self._process = process
        self._instance = instance
        self._recorder = recorder
        instance.note = self._note
        self._number = 0

    def perform(self, step: Step) -> None:
        instance, model = self._instance, step.model
        self._number = step.number
        operation = instance.possible(step.operation, model)
        found = instance.memory.checksum(model)
        self._note(operation=operation, model=model, timeout=step.timeout, found=found, began=now())
        result = self._result(operation, step)
        ended = now()  # the checksums below are not part of the call
        self._note(**result, ended=ended, after=instance.memory.checksum(model), views=instance.view_checksums())

    def _result(self, operation: str, step: Step) -> dict[str, Any]:
        try:
            return OPERATIONS[operation](self._instance, step)
        except BrokerError as error:
            self._instance.failed(step.model, error)
            return {
                "outcome": str(error.reason),
                "message": error.message,
                "touched": error.touched,
                "quiesced": error.quiesced,
            }
        except BaseException:  # noqa: BLE001 - the model rejects it, whatever it is
            return {"outcome": "crashed", "message": traceback.format_exc(), "touched": True}

    def _note(self, **values: Any) -> None:
        self._recorder.write("call", process=self._process, number=self._number, **values)


def hang_up(path: str) -> None:
    """Cuts every connection of this process to a socket of the broker."""
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, or not connected
            if os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(entry))) as connection:
                    if str(connection.getpeername()).endswith(path):
                        connection.shutdown(socket.SHUT_RDWR)


def obey(switch: socket.socket) -> None:
    while command := switch.recv(1):
        hang_up(HANG_UPS[command])


def main() -> None:
    connection, switch = Connection(int(sys.argv[1])), socket.socket(fileno=int(sys.argv[2]))
    process, kind, card, directory = sys.argv[3], sys.argv[4], int(sys.argv[5]), Path(sys.argv[6])
    instance = Instance(process, memory_of(kind, card))
    actor = Actor(process, instance, Recorder(directory / f"{process}.jsonl"))
    threading.Thread(target=obey, args=(switch,), daemon=True).start()
    while True:
        try:
            step = connection.recv()
        except EOFError:
            return
        actor.perform(step)
        connection.send("done")


if __name__ == "__main__":
    main()
