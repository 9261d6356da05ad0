"""How a request to a card ends if it does not succeed."""

from __future__ import annotations


class CardError(Exception):
    """A card did not do what it was asked to. The text has the driver's or the engine's own words.

    `touched`: memory that was to be filled may have been written. `quiesced`: nobody writes to it any more.
    """

    def __init__(self, message: str, *, touched: bool = False, quiesced: bool = True) -> None:
        super().__init__(message)
        self.touched = touched
        self.quiesced = quiesced


class CardRefused(CardError):
    """The driver or the engine refused; the card goes on serving."""


class EngineRefused(CardRefused):
    """The engine refused, or cannot be relied on because the worker may have taken its client for dead. A fresh process
    may fare better."""


class ImportRefused(CardRefused):
    """The driver does not let the card's process import a region. Its owner may stage it instead."""

    def __init__(self, message: str, region_id: str) -> None:
        super().__init__(message)
        self.region_id = region_id


class CardUnavailable(CardError):
    """The card cannot serve now: its process does not start, or the datasystem worker is away."""


class CardLost(CardError):
    """The card's process ended in the middle of the request, or was ended because the engine failed."""


class CardTimeout(CardError):
    """The deadline passed. What was writing has been killed."""
