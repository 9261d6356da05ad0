"""Which package may import which: the floors of docs/ARCHITECTURE.md, written in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCES = {"weight_broker": REPOSITORY / "client", "weight_brokerd": REPOSITORY / "broker"}
GENERATED = {"weight_broker.v1"}


def floors() -> set[str]:
    """The packages and modules that have a floor."""
    configuration = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    [contract] = [one for one in configuration["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    return {name.strip() for layer in contract["layers"] for name in layer.replace("|", ":").split(":")}


def packages() -> Iterator[str]:
    """Every package, and every module beside them, directly below a root."""
    for root, source in SOURCES.items():
        for path in (source / root).iterdir():
            name = path.stem
            if (path.suffix == ".py" or (path / "__init__.py").exists()) and name != "__init__":
                yield f"{root}.{name}"


def test_every_import_keeps_to_the_floors() -> None:
    """In a process of its own: import-linter configures logging, which would silence the loggers of other tests."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_package_has_a_floor() -> None:
    assert sorted(set(packages()) - floors() - GENERATED) == []
