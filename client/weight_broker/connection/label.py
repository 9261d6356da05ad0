"""Texts that are shown to people and decide nothing: neither their length nor a character in them may fail a call."""

from __future__ import annotations

MAX_NAME_CHARACTERS = 128
_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"


def name_label(text: str) -> str:
    """An instance's name as the broker accepts it: printable and short."""
    printable = "".join(character if character.isprintable() else _UNPRINTABLE for character in str(text))
    return shortened(printable, MAX_NAME_CHARACTERS)


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, all of which UTF-8 can carry: file names may have others."""
    carried = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return carried if len(carried) <= limit else carried[: limit - 1] + "…"
