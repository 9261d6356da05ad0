"""The error of a call of any device's driver."""

from __future__ import annotations


class DriverError(Exception):
    """A call failed. `call` is the driver's function, `code` its error code, `words` the driver's text."""

    def __init__(self, call: str, code: int, words: str) -> None:
        super().__init__(call, code, words)  # all three, for pickling
        self.call = call
        self.code = code
        self.words = words

    def __str__(self) -> str:
        return f"{self.call} failed with {self.code}" + (f": {self.words}" if self.words else "")
