"""How a call of a device's driver fails, whichever driver it is."""

from __future__ import annotations


class DriverError(Exception):
    """A call failed. `call` is the driver's name of it, `code` its error, `words` what it says about it."""

    def __init__(self, call: str, code: int, words: str) -> None:
        super().__init__(call, code, words)  # all three, so that it survives pickling
        self.call = call
        self.code = code
        self.words = words

    def __str__(self) -> str:
        return f"{self.call} failed with {self.code}" + (f": {self.words}" if self.words else "")
