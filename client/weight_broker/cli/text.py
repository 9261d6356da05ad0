"""Numbers and states as people read them."""

from __future__ import annotations

import unicodedata

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes in powers of 1000, for example "988 MB"."""
    unit = 0
    while count >= 999.5 and unit < len(_BYTE_UNITS) - 1:
        count /= 1000
        unit += 1
    return f"{count:.0f} {_BYTE_UNITS[unit]}" if unit == 0 or count >= 99.5 else f"{count:.3g} {_BYTE_UNITS[unit]}"


def seconds(value: float) -> str:
    """A duration with three digits, for example "4.21 ms"."""
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms" if value < 0.0995 else f"{value * 1e3:.0f} ms"
    if value < 120:
        return f"{value:.3g} s" if value < 99.5 else f"{value:.0f} s"
    return age(value)


def age(value: float) -> str:
    """A long duration with its two largest units, for example "3h 12m"."""
    total = int(value)
    for unit, length, lower, lower_length in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if total >= length:
            return f"{total // length}{unit} {total % length // lower_length}{lower}"
    return f"{total}s"


def state(name: str) -> str:
    """The end of a protobuf enum's name in lower case: "STATE_RESIDENT" is "resident"."""
    return name.partition("_")[2].lower().replace("_", " ")


def plain(text: str) -> str:
    """Text from an instance without what could drive a terminal or forge lines."""
    return "".join(character if unicodedata.category(character)[0] != "C" else "�" for character in text)
