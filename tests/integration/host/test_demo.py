"""The demo as a user runs it: a process of its own, with real brokers and instances."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.models import write_model
from support.waiting import eventually

pytest.importorskip("rich")
COMMAND = [sys.executable, "-m", "weight_broker.cli.main", "demo"]
LIMIT_SECONDS = 170


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo puts its temporary files; a short path, because sockets are among them."""
    with tempfile.TemporaryDirectory(prefix="wb-") as directory:
        yield Path(directory)


@pytest.fixture
def environment(tmp_path: Path, temporary: Path) -> dict[str, str]:
    """Caches and temporary files in the test's own directories, and a broker of the user's that is not to be used."""
    return os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(temporary),
        "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(tmp_path / "the-users-own"),
        "WEIGHT_BROKER_LIMITS_INSTANCES": "1",
    }


@pytest.fixture
def nothing_is_left(temporary: Path) -> Iterator[None]:
    """Fails if a process or a file of the demo outlives it."""
    yield
    eventually(lambda: not demo_processes(temporary), within=60)
    assert list(temporary.iterdir()) == []


def demo_processes(temporary: Path) -> list[int]:
    """Processes whose temporary files are in the test's directory or the demo's within it, other than zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes()
            except OSError:
                continue
            if any(one.startswith(f"TMPDIR={temporary}".encode()) for one in variables.split(b"\0")):
                found.append(int(entry.name))
    return found


def demo(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


@pytest.mark.usefixtures("nothing_is_left")
def test_one_instance_reads_the_disk_and_the_others_are_filled_from_it(environment: dict[str, str]) -> None:
    done = demo(environment, "--size", "4M", "--instances", "2", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    first, warm, copied, mapped = answer["instances"]
    assert [(one["source"], one["path"]) for one in (first, warm, copied, mapped)] == [
        ("disk", "read"),
        ("disk", "read"),
        ("instance 1", "copy"),
        ("instance 1", "zero_copy"),
    ]
    assert len({one["logits_digest"] for one in answer["instances"]}) == 1
    assert answer["failures"] == []
    if answer["cold_page_cache"]:
        assert first["disk_bytes"] >= 0.9 * first["size_bytes"]
        assert all(one["disk_bytes"] < 0.5 * one["size_bytes"] for one in (copied, mapped))
    state = answer["status"]
    assert {one["name"] for one in state["instances"]} == {"instance 1", "instance 2", "instance 3"}
    assert [one["state"] for one in state["transfers"]] == ["STATE_SUCCEEDED"] * 2
    assert len(state["weight_sets"]) == 1


@pytest.mark.usefixtures("nothing_is_left")
def test_a_model_of_ones_own_can_be_given_and_is_shown_in_tables(tmp_path: Path, environment: dict[str, str]) -> None:
    model_dir = write_model(tmp_path / "my model", tied=False)
    done = demo(environment, "--model-dir", str(model_dir), "--instances", "1")
    assert done.returncode == 0, done.stderr
    squeezed = " ".join(done.stdout.split())
    for text in ("instance 1 copy", "warm disk", "x cold", "identical, bit for bit", "my model", "resident"):
        assert text in squeezed, text


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize(
    ("moment", "number"),
    [("instance 1: importing", signal.SIGTERM), ("instance 2, instance 3: importing", signal.SIGINT)],
)
def test_a_demo_that_is_interrupted_leaves_nothing(
    environment: dict[str, str], moment: str, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--size", "2M", "--instances", "2"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    assert any(line.startswith(moment) for line in process.stderr)
    process.send_signal(number)
    _, err = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("package", ["grpc", "rich", "torch"])
def test_a_demo_that_is_interrupted_while_it_imports_leaves_nothing(
    environment: dict[str, str], tmp_path: Path, package: str, number: signal.Signals
) -> None:
    """The package interrupts its importer and drops the exception, as extension modules do; it is of no use besides."""
    (tmp_path / f"{package}.py").write_text(
        f"import signal\ntry:\n    signal.raise_signal({int(number)})\nexcept BaseException:\n    pass\n"
    )
    done = demo(environment | {"PYTHONPATH": str(tmp_path)}, "--size", "2M", "--instances", "1")
    assert done.returncode == 130
    assert done.stderr.count("Traceback") == 0


@pytest.mark.usefixtures("nothing_is_left")
def test_a_broker_that_does_not_start_is_told_with_its_log(environment: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "weight_brokerd"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("")
    (broken / "__main__.py").write_text("raise SystemExit('out of order')")
    done = demo(environment | {"PYTHONPATH": str(broken.parent)}, "--size", "1M", "--instances", "1")
    assert done.returncode == 1
    assert "the broker ended with 1" in done.stderr
    assert "out of order" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-dir", "/nowhere"], "/nowhere is not a directory"),
        (["--size", "many"], "not a size"),
        (["--size", "64M", "--model-dir", "/tmp"], "does not go with"),
        (["--size", "1T"], "take a smaller model"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(environment: dict[str, str], arguments: list[str], message: str) -> None:
    done = demo(environment, *arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
