"""Offers: what a sender lets one reader fetch under a key."""

from __future__ import annotations

import enum
import secrets

MAXIMUM_TIMEOUT_SECONDS = 1800
"""The engine waits no longer for a key."""


def fresh_key() -> str:
    """A key that is never used twice: a key is a transfer."""
    return f"weight-broker-{secrets.token_hex(16)}"


class OfferEnd(enum.Enum):
    """How an offer's reader ended."""

    DELIVERED = "delivered"
    """Its fetch returned without an error."""
    UNREAD = "unread"
    """It never asked the engine for the key."""
    ABANDONED = "abandoned"
    """It was killed or failed: the sender may be stuck with it."""
