"""Arguments and output in any encoding: names of models are UTF-8, a container's locale may be ASCII."""

from __future__ import annotations

import codecs
import io
import os
import sys


def carry_every_character() -> None:
    """Escape what the standard streams cannot encode, which would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def carries_unicode() -> bool:
    """Whether standard output can encode every character."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")


def text_argument(argument: str) -> str:
    """An argument that is no path: UTF-8, also where the locale is not."""
    return os.fsencode(argument).decode("utf-8", "replace") if _is_undecoded(argument) else argument


def _is_undecoded(argument: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in argument)
