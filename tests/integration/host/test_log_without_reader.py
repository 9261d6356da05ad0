"""A broker whose log is not read: it answers, it stops, and it says later what is missing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.broker_process import BrokerProcess
from support.raw_client import RawClient
from support.waiting import eventually

PIPE_BYTES = 4096
"""The smallest pipe: some twenty lines."""


class UnreadBroker(BrokerProcess):
    """Its log goes to a pipe, `reading_end`, that nothing reads before `lines`."""

    def __init__(self, runtime_directory: Path, **environment: str) -> None:
        super().__init__(runtime_directory, WEIGHT_BROKER_LOG_LEVEL="debug", **environment)
        self.reading_end, writing_end = os.pipe()
        fcntl.fcntl(writing_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.log_path = Path(f"/proc/self/fd/{writing_end}")
        self._writing_end = writing_end

    @property
    def log(self) -> str:
        return ""

    def fill_log(self) -> None:
        """Attach and go, two lines each: many times what the pipe holds."""
        for _ in range(100):
            RawClient(self.runtime_directory).close()

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is read from now on."""
        os.close(self._writing_end)
        with os.fdopen(self.reading_end, "rb") as pipe:
            yield from map(json.loads, pipe)


@contextmanager
def unread(directory: Path, **environment: str) -> Iterator[UnreadBroker]:
    broker = UnreadBroker(directory / "run", **environment)
    try:
        yield broker
    finally:
        broker.close()


def test_a_broker_whose_log_nothing_reads_answers_and_stops(tmp_path: Path) -> None:
    with unread(tmp_path) as broker:
        broker.start()
        broker.fill_log()
        with RawClient(broker.runtime_directory) as client:
            assert client.publish().publication_id
            assert broker.host().publication_count == 1
        assert broker.terminate() == 0


def test_dropped_lines_are_counted_and_the_log_says_where_they_are_missing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    with unread(tmp_path, WEIGHT_BROKER_METRICS_LISTEN=listen) as broker:
        broker.start()

        def dropped() -> float:
            with urllib.request.urlopen(f"http://{listen}/metrics", timeout=60) as answer:
                text = answer.read().decode()
            [line] = [line for line in text.splitlines() if line.startswith("weight_broker_log_lines_dropped_total ")]
            return float(line.split()[1])

        assert dropped() == 0
        with RawClient(broker.runtime_directory) as client:
            while not dropped():  # until the queue is full too: 4 MiB
                for number in range(500):
                    client.offer_region(f"{number:060}")
                    client.withdraw_region(f"{number:060}")
        lines = broker.lines()
        [gap] = [next(line for line in lines if line["event"] == "log_lines_dropped")]
        assert (gap["level"], gap["logger"], gap["count"] > 0) == ("warning", "weight_brokerd", True)
        assert broker.process is not None
        broker.process.terminate()
        assert [line["event"] for line in lines][-1] == "stopped", "the log goes on after the gap"
        assert broker.process.wait(60) == 0


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    with unread(tmp_path) as broker:
        broker.start()
        os.close(broker.reading_end)
        broker.fill_log()
        assert broker.host().pid == broker.pid
        assert broker.terminate() == 0


@pytest.mark.parametrize("closed", [(2,), (1, 2), (0, 1, 2)])
def test_a_broker_without_standard_streams_serves_and_keeps_its_files(tmp_path: Path, closed: tuple[int, ...]) -> None:
    script = "; ".join(f"os.close({number})" for number in closed)
    program = f"import os; {script}; os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'weight_brokerd'])"
    broker = BrokerProcess(tmp_path / "run")
    broker.process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(broker.runtime_directory)},
    )
    try:
        eventually(broker.is_accepting)
        for _ in range(5):
            RawClient(broker.runtime_directory).close()
        for number in closed:
            assert os.readlink(f"/proc/{broker.pid}/fd/{number}") == "/dev/null"
        assert b"event" not in (broker.runtime_directory / "lock").read_bytes()
        assert broker.terminate() == 0
    finally:
        broker.close()
