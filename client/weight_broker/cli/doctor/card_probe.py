"""Opens a card and looks at an export key of it for the doctor: `python -m weight_broker.cli.doctor.card_probe`.

A process of its own: opening a card takes memory on it until the process ends. What it looks at are rows P2 and P3 of
the proof that need no second process.
"""

from __future__ import annotations

import json
import os
import sys

from weight_broker.drivers import acl

_BYTES = 2 << 20
_CARD = slice(24, 26)
"""Of an export key: the card's physical number."""


def main() -> dict[str, object]:
    """The card's number by the runtime and by a key of its memory; `problem` if there is none."""
    try:
        runtime = acl.load()
        runtime.initialize()
        runtime.set_device(0)
        key = runtime.ipc_export_key(runtime.malloc(_BYTES), _BYTES, acl.EXPORT_TO_ANY_PROCESS)
        return {"number": runtime.physical_device(0), "in_key": int(key[_CARD], 16)}
    except (acl.AclError, ValueError) as error:
        return {"problem": str(error)}


if __name__ == "__main__":
    # Libraries print what they like; the answer is the last line.
    private = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    private.write(json.dumps(main()) + "\n")
    private.flush()
    os._exit(0)
