"""Where output goes: JSON with the standard library and protobuf, tables with rich."""

from __future__ import annotations

import inspect
import json
import sys
from typing import TYPE_CHECKING, Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from weight_broker.cli.failure import CommandError, ExitCode

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 180
# protobuf 5.26 renamed the option that prints zeros and empty lists.
_DEFAULTS_TOO: dict[str, Any] = {
    name: True
    for name in ("always_print_fields_with_no_presence", "including_default_value_fields")
    if name in inspect.signature(MessageToDict).parameters
}


def console(*, stderr: bool = False) -> Console:
    """A terminal for tables; wide where the output is not a terminal, so that nothing is cut off."""
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
    """An empty table; `columns` are names separated by "|", one that starts with ">" is aligned to the right."""
    from rich import box
    from rich.table import Table

    table_ = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(columns.split("|")):
        right = name.startswith(">")
        # What a row is called stays in one piece on a narrow terminal.
        table_.add_column(
            name.removeprefix(">"), justify="right" if right else "left", overflow="fold", no_wrap=index == 0
        )
    return table_


def message_to_json(message: Message) -> dict[str, Any]:
    """The message in protobuf's JSON form with the names of the proto files: 64-bit numbers are strings."""
    return MessageToDict(message, preserving_proto_field_name=True, **_DEFAULTS_TOO)


def print_json(value: object, *, line: bool = False) -> None:
    """Prints JSON; on one line, at once, if `line`."""
    print(json.dumps(value, ensure_ascii=False, indent=None if line else 2), flush=line)
