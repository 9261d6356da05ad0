"""The project's documents: their tables, references and examples, and a way to follow the examples."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.waiting import eventually

REPOSITORY = Path(__file__).parents[2]

# Stays open after the example, as a Python prompt does, so that what it published stays published.
_PROMPT = "import runpy, sys, pathlib; kept = runpy.run_path(sys.argv[1]); pathlib.Path(sys.argv[2]).touch(); input()"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_COMMAND_SECONDS = 60.0
_PROMPT_SECONDS = 90.0


@dataclass(frozen=True)
class Command:
    """A line of a console that starts with "$ ", with its continuations, and the output that is shown below it."""

    line: str
    output: str


class Document:
    """One Markdown file."""

    def __init__(self, name: str) -> None:
        self.path = REPOSITORY / name
        self.text = self.path.read_text()
        self.prose = _FENCE.sub("", self.text)

    @property
    def examples(self) -> list[tuple[str, str]]:
        """Every fenced block, in order: (language, content)."""
        return [(match[1], match[2]) for match in _FENCE.finditer(self.text)]

    @property
    def commands(self) -> list[Command]:
        """Every command of every console block."""
        return [command for language, block in self.examples if language == "console" for command in commands_in(block)]

    @property
    def code_spans(self) -> list[str]:
        """Every `code` in the prose."""
        return _SPAN.findall(self.prose)

    @property
    def links(self) -> list[str]:
        """Targets of all links."""
        return _LINK.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """The ends of links to headings of this document."""
        kept = (re.sub(r"[^\w\- ]", "", heading).lower() for heading in _HEADING.findall(self.prose))
        return {heading.replace(" ", "-") for heading in kept}

    def table(self, first_column: str, *, below: str = "") -> list[list[str]]:
        """The cells of the only table whose first column has this title, without the title; after the heading `below`
        if there are several."""
        text = self.prose[self.prose.index(f"\n## {below}\n") :] if below else self.prose
        begin = text.index(f"\n| {first_column} |") + 1
        lines = text[begin:].split("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[2:]]


def commands_in(block: str) -> Iterator[Command]:
    """The commands of a console block."""
    line, output = "", ""
    for part in re.split(r"^(?=\$ )", block, flags=re.MULTILINE):
        if not part.strip():
            continue
        line, _, output = part.replace("\\\n", "\\\0").partition("\n")
        yield Command(line.removeprefix("$ ").replace("\\\0", ""), output)


def matches(shown: str, printed: str) -> bool:
    """Whether a command printed what the document shows; "..." stands for anything."""
    pattern = ".*".join(re.escape(part) for part in _trimmed(shown).split("..."))
    return re.fullmatch(pattern, _trimmed(printed), re.DOTALL) is not None


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


class Reader:
    """Follows a document: runs every command in a shell, every Python block in a prompt that stays open."""

    def __init__(self, directory: Path, replacements: dict[str, str]) -> None:
        """`replacements` are made in everything that is run or compared."""
        self._directory = directory / "checkout"
        self._directory.mkdir()
        for entry in REPOSITORY.iterdir():
            if not entry.name.startswith("."):
                (self._directory / entry.name).symlink_to(entry)
        (self._directory / ".venv").symlink_to(sys.prefix)
        self._scratch = directory
        self._runtime_directory = directory / "run"
        self._replacements = {"/run/weight-broker": str(self._runtime_directory), **replacements}
        self._processes: list[subprocess.Popen[bytes]] = []
        foreign = ("WEIGHT_BROKER_", "NOTIFY_", "WATCHDOG_", "MAKE", "MFLAGS")
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self._runtime_directory),
            "XDG_CACHE_HOME": str(directory / "cache"),
        }

    def type(self, command: Command) -> None:
        """Runs a command; fails unless it succeeds and prints what is shown."""
        line = self._replaced(command.line)
        if line.endswith(" &"):
            self._start_broker(line)
            return
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_COMMAND_SECONDS,
        )
        assert done.returncode == 0, f"$ {line}\n{done.stdout}\nexit status {done.returncode}"
        if command.output:
            shown = self._replaced(command.output)
            assert matches(shown, done.stdout), f"$ {line}\nprinted:\n{done.stdout}\nthe document shows:\n{shown}"

    def paste(self, code: str) -> None:
        """Runs a Python block in a prompt of its own."""
        number = len(self._processes)
        script, done, log = (self._scratch / f"prompt-{number}.{end}" for end in ("py", "done", "log"))
        script.write_text(self._replaced(code))
        self._begin([sys.executable, "-c", _PROMPT, str(script), str(done)], log)
        prompt = self._processes[-1]
        eventually(lambda: done.exists() or prompt.poll() is not None, within=_PROMPT_SECONDS)
        assert done.exists(), f"{script.read_text()}\n{log.read_text()}"

    def leave(self) -> None:
        """Closes everything that was left open, the last first."""
        for process in reversed(self._processes):
            if process.stdin is not None:
                process.stdin.close()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _start_broker(self, line: str) -> None:
        log = self._scratch / "broker.log"
        self._begin(["bash", "-c", f"{line} wait"], log)
        began = time.monotonic()
        socket = self._runtime_directory / "attach.sock"
        eventually(lambda: socket.exists() or self._processes[-1].poll() is not None)
        assert socket.exists(), f"$ {line} (after {time.monotonic() - began:.1f} s)\n{log.read_text()}"

    def _begin(self, command: list[str], log: Path) -> None:
        with log.open("wb") as stream:
            self._processes.append(
                subprocess.Popen(
                    command,
                    cwd=self._directory,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _replaced(self, text: str) -> str:
        for old, new in self._replacements.items():
            text = text.replace(old, new)
        return text
