"""Fixtures: an emulated Ascend host, processes on it, a real datasystem worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from doubles.cann.build import CannotBuild, build
from doubles.cann.control import CannHost
from support.card_process import CardProcess
from support.datasystem_worker import DatasystemWorker, require_wheel


@pytest.fixture
def cann_host() -> Iterator[CannHost]:
    """A host with 8 cards of 4 GiB."""
    try:
        build()
    except CannotBuild as error:
        if "needs a C compiler" in str(error):
            pytest.skip(str(error))
        raise
    with CannHost() as host:
        yield host


@pytest.fixture
def start_process(cann_host: CannHost) -> Iterator[Callable[..., CardProcess]]:
    """Starts processes on the host; ends them after the test."""
    with ExitStack() as stack:

        def start(**options: Any) -> CardProcess:
            process = CardProcess(cann_host, **options)
            stack.callback(process.close)
            return process

        yield start


@pytest.fixture(scope="module")
def worker() -> Iterator[DatasystemWorker]:
    """A datasystem worker for the tests of a module."""
    require_wheel()
    running = DatasystemWorker()
    try:
        yield running.start()
    finally:
        running.close()
