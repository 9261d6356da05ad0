"""SGLang's kernels, of which there is no build for processors to install: names that can be imported, and not used.

Loading a model imports the modules that use them and calls none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_args: object, **_options: object) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} is not here")

    return absent
