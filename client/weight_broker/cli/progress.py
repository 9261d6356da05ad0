"""Progress of a command: bars on a terminal, plain lines without rich or with --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weight_broker.cli import output


class Progress:
    """Writes to standard error; standard output is for the result."""

    def __init__(self, *, quiet: bool) -> None:
        """`quiet` needs no rich and shows no bars."""
        self._console = None if quiet else output.console(stderr=True)

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """A step of unknown duration: a moving bar with the elapsed time. Yields a function that changes the title;
        without a terminal each new title is a line."""
        if self._console is None or not self._console.is_terminal:
            shown = [title]

            def say_once(changed: str) -> None:
                if changed != shown[-1]:
                    shown[:] = [changed]
                    self.say(changed)

            self.say(title)
            yield say_once
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        with Bars(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), console=self._console
        ) as bars:
            task = bars.add_task(title, total=None)
            yield lambda changed: bars.update(task, description=changed)
            bars.update(task, total=1, completed=1)

    @contextmanager
    def bytes_written(self, title: str, total: int) -> Iterator[Callable[[int, int], None]]:
        """A step of known size. Yields a function that takes the bytes done and the bytes in all."""
        if self._console is None or not self._console.is_terminal:
            self.say(title)
            yield lambda done, of: None
            return
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Bars(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=self._console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda done, of: bars.update(task, completed=done, total=of)
            bars.update(task, completed=total)
