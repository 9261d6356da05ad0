"""What commands print: JSON, tables, and numbers and states as people read them."""

from __future__ import annotations

import inspect
import json
import sys
import unicodedata
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from weight_broker.cli.encoding import carries_unicode
from weight_broker.cli.failure import CommandError, ExitCode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 180
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
# protobuf 5.26 renamed the option that prints zeros and empty lists.
_DEFAULTS_TOO: dict[str, Any] = {
    name: True
    for name in ("always_print_fields_with_no_presence", "including_default_value_fields")
    if name in inspect.signature(MessageToDict).parameters
}


def console(*, stderr: bool = False) -> Console:
    """The console for tables; wide where the output is not a terminal, so that nothing is cut off."""
    try:
        from rich.console import Console
    except ImportError:
        raise CommandError(
            "tables need the package rich: pip install 'weight-broker[cli]', or use --json", ExitCode.USAGE
        ) from None
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    # Names come from instances: nothing in them is markup.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)


def table(title: str, columns: str) -> Table:
    """An empty table; `columns` are names separated by "|"; ">" before a name aligns it to the right."""
    from rich import box
    from rich.table import Table

    table_ = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(columns.split("|")):
        right = name.startswith(">")
        # The first column names the row and is not wrapped.
        table_.add_column(
            name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=index == 0
        )
    return table_


def message_to_json(message: Message) -> dict[str, Any]:
    """The message in protobuf's JSON form with the names of the proto files: 64-bit numbers are strings."""
    return MessageToDict(message, preserving_proto_field_name=True, **_DEFAULTS_TOO)


def print_json(value: object, *, line: bool = False) -> None:
    """`line`: on one line, flushed."""
    print(json.dumps(value, ensure_ascii=not carries_unicode(), indent=None if line else 2), flush=line)


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
    """Text from an instance, without characters that could drive a terminal or forge lines."""
    return "".join(character if unicodedata.category(character)[0] != "C" else "�" for character in text)
