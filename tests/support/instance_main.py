"""The program of an `InstanceProcess`."""

from __future__ import annotations

import importlib
import sys
import traceback
from multiprocessing.connection import Connection

from support.actions import State
from weight_broker.errors import BrokerError


def main() -> None:
    """Does what comes in, one after the other."""
    connection = Connection(int(sys.argv[1]))
    state = State(sys.argv[2])
    while True:
        try:
            module, name, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(importlib.import_module(module), name)(state, *args, **kwargs)
        except BrokerError as error:
            connection.send(("broker error", portable(error)))
        except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
            connection.send(("failed", traceback.format_exc()))
        else:
            connection.send(("returned", answer))


def portable(error: BrokerError) -> BrokerError:
    """The error without what cannot be pickled (causes, leases)."""
    copy: BrokerError = BrokerError.__new__(type(error))
    BrokerError.__init__(
        copy,
        error.message,
        reason=error.reason,
        touched=error.touched,
        quiesced=error.quiesced,
        metadata=error.metadata,
    )
    return copy


if __name__ == "__main__":
    main()
