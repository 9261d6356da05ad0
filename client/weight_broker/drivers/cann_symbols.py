"""Which functions of CANN's libraries the datasystem's plugin misses: `python -m weight_broker.drivers.cann_symbols`
prints JSON. A process of its own loads the libraries, because a broken installation may end it. No card is opened.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import NamedTuple

NEEDED = {
    "libra.so": ("RaInit",),
    "libhccl_plf.so": ("hrtGetDevicePhyIdByIndex", "hrtGetDeviceRefresh"),
}
"""Of what the plugin is linked against, the functions by which releases of CANN differ: libra's have other names before
8.5. The plugin binds all of them at once, so it loads with all or not at all."""


class Looked(NamedTuple):
    """What the loader of this process finds."""

    unloadable: dict[str, str]
    """The loader's words, by library."""
    missing: tuple[str, ...]
    """As "RaInit in libra.so"."""


def look() -> Looked:
    """Loads the libraries."""
    unloadable: dict[str, str] = {}
    missing: list[str] = []
    for library, names in NEEDED.items():
        try:
            loaded = ctypes.CDLL(library, mode=os.RTLD_LAZY)
        except OSError as error:
            unloadable[library] = str(error)
            continue
        missing += [f"{name} in {library}" for name in names if not hasattr(loaded, name)]
    return Looked(unloadable, tuple(missing))


def parse(printed: str) -> Looked | None:
    """What this program printed; None if that is something else."""
    try:
        unloadable, missing = json.loads(printed.splitlines()[-1])
        return Looked(dict(unloadable), tuple(missing))
    except (ValueError, IndexError, TypeError):
        return None


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look()) + "\n")
    sys.stdout.flush()
    os._exit(0)  # libraries may hang in their destructors
