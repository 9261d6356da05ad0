"""The program of a `CardProcess`."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from multiprocessing.connection import Connection

from support.acl import AclError


def main() -> None:
    """Does what comes in, one after the other."""
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            module, name, args, kwargs = connection.recv()
        except EOFError:
            os._exit(0)  # a client of the engine that hangs in its destructor is no concern of the test
        try:
            answer = getattr(importlib.import_module(module), name)(*args, **kwargs)
        except AclError as error:
            connection.send(("refused", error))
        except BaseException:  # noqa: BLE001 - whatever it is, the test is to see it
            connection.send(("failed", traceback.format_exc()))
        else:
            connection.send(("returned", answer))


if __name__ == "__main__":
    main()
