"""A command that is interrupted ends with KeyboardInterrupt, and never in the middle of an import."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from weight_broker.cli import failure

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that is interrupted while it is imported and drops the exception, as extension modules do."""
    name = "interrupted_while_imported"
    (tmp_path / f"{name}.py").write_text(
        "import signal, weight_broker\n"
        "try:\n    signal.raise_signal(weight_broker.number_for_test)\nexcept BaseException:\n    pass\n"
        "complete = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture(autouse=True)
def handlers_are_given_back() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def run(*steps: Callable[[], object]) -> None:
    """Runs a command of these steps as the command line does."""
    with failure.stoppable():
        for step in steps:
            step()


def wait_for_the_signal() -> None:
    time.sleep(60)
    pytest.fail("the signal never came")


@SIGNALS
def test_a_signal_ends_the_command(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(partial(signal.raise_signal, number), partial(pytest.fail, "it goes on"))


@SIGNALS
def test_a_signal_during_an_import_ends_the_command_once_the_import_is_complete(
    number: signal.Signals, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_broker.number_for_test", number, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(partial(importlib.import_module, module), wait_for_the_signal)
    assert sys.modules[module].complete


def test_a_signal_during_the_last_import_is_not_forgotten(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weight_broker.number_for_test", signal.SIGTERM, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(partial(importlib.import_module, module))


def test_what_is_made_while_signals_are_held_is_noted_before_one_ends_the_command() -> None:
    made: list[str] = []

    def make() -> None:
        with failure.held():
            signal.raise_signal(signal.SIGTERM)
            made.append("a process")

    with pytest.raises(KeyboardInterrupt):
        run(make, wait_for_the_signal)
    assert made == ["a process"]


def test_cleaning_up_is_not_interrupted() -> None:
    done: list[str] = []
    with failure.stoppable(), failure.uninterrupted():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.raise_signal(number)
        done.append("all removed")
    assert done == ["all removed"]
