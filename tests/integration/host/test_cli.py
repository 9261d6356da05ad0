"""The command line against a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.broker_process import BrokerProcess
from support.raw_client import RawClient
from weight_broker import BrokerClient, BrokerUnavailable, ColdLoadLease, ParallelRank, WeightSetKey
from weight_broker.cli.main import main, parser

KEY = WeightSetKey("org/model", "v1", dtype="float16", rank=ParallelRank(1, 2), engine_attributes={"kernel": "fast"})
OTHER = WeightSetKey("org/model", "v2", dtype="float16", rank=ParallelRank(1, 2), engine_attributes={"kernel": "fast"})
Run = Callable[..., tuple[int, str, str]]


def tensors() -> dict[str, object]:
    return {"weight": np.arange(1000, dtype=np.float16), "bias": np.zeros(10, dtype=np.float16)}


@pytest.fixture
def run(broker: BrokerProcess, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command against the broker: exit code, standard output, standard error."""

    def command(name: str, *arguments: str, directory: Path = broker.runtime_directory) -> tuple[int, str, str]:
        code = main([name, "--runtime-directory", str(directory), *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def publisher(broker: BrokerProcess) -> Iterator[BrokerClient]:
    """An instance that has published `KEY`."""
    with BrokerClient(broker.runtime_directory, name="the publisher") as client:
        client.publish(KEY, tensors())
        yield client


@pytest.mark.usefixtures("publisher")
def test_status_shows_what_there_is(broker: BrokerProcess, run: Run) -> None:
    with BrokerClient(broker.runtime_directory, name="the loader") as loader:
        lease = loader.acquire_or_lease(OTHER, tensors())
        assert isinstance(lease, ColdLoadLease)
        loader.acquire(KEY, tensors())
        code, out, _ = run("status")
    assert code == 0
    for text in (
        f"broker 0.1.0, pid {broker.pid}", KEY.id[:12], "org/model", "tp 1/2", "the publisher", "the loader",
        "resident", "Cold-load leases", str(lease.fencing_token), "succeeded", "2.02 kB",
    ):  # fmt: skip
        assert text in out, text


@pytest.mark.usefixtures("publisher")
def test_status_as_json_has_every_field(broker: BrokerProcess, run: Run) -> None:
    with BrokerClient(broker.runtime_directory, name="reader") as reader:
        reader.acquire(KEY, tensors())
        code, out, _ = run("status", "--json")
    state = json.loads(out)
    assert code == 0
    assert state["host"]["pid"] == broker.pid
    assert state["host"]["draining"] is False
    (weight_set,) = state["weight_sets"]
    assert weight_set["weight_set_id"] == KEY.id
    assert weight_set["publications"][0]["size_bytes"] == "2020"
    assert [one["name"] for one in state["instances"]] == ["the publisher", "reader"]
    assert state["transfers"][0]["state"] == "STATE_SUCCEEDED"
    assert state["cold_load_leases"] == []


@pytest.mark.usefixtures("broker")
def test_status_of_an_idle_broker_is_one_line(run: Run) -> None:
    code, out, _ = run("status")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert "0 instances, 0 publications" in out


def test_more_than_a_page_is_read_to_the_end(
    publisher: BrokerClient, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weight_broker.cli.inspector._PAGE_SIZE", 2)
    for number in range(4):
        publisher.publish(WeightSetKey(f"model {number}"), tensors())
    state = json.loads(run("status", "--json")[1])
    assert {one["key"]["model"] for one in state["weight_sets"]} == {"org/model", *(f"model {i}" for i in range(4))}


def test_a_name_cannot_drive_the_terminal(broker: BrokerProcess, run: Run) -> None:
    with BrokerClient(broker.runtime_directory, name="[bold]name :heart:") as client:
        client.publish(WeightSetKey("evil\x1b[2Jmodel"), tensors())
        out = run("status")[1]
    assert "\x1b" not in out
    assert "[2Jmodel" in out
    assert "[bold]name :heart:" in out


def test_json_needs_no_rich(publisher: BrokerClient, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    for command in (("status",), ("explain", KEY.id)):
        code, _, err = run(*command)
        assert (code, "pip install" in err) == (2, True)
    for command in (("status",), ("explain", KEY.id)):
        code, out, _ = run(*command, "--json")
        assert code == 0
        json.loads(out)


@pytest.mark.usefixtures("publisher")
@pytest.mark.parametrize(
    "arguments",
    [
        (KEY.id,),
        (KEY.id.upper(),),
        (KEY.id[:6],),
        (KEY.canonical,),
        ("--model", "org/model", "--revision", "v1", "--dtype", "float16"),
    ],
    ids=["id", "upper case", "start of the id", "canonical key", "options"],
)
def test_explain_takes_a_key_in_any_form(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, _ = run("explain", *arguments, "--json")
    answer = json.loads(out)
    assert code == 0
    if arguments[0] == "--model":  # the options do not give the rank, and so this is another weight set
        assert answer["outcome"] == "OUTCOME_COLD_LOAD"
        assert answer["near_misses"][0]["weight_set_id"] == KEY.id
    else:
        assert answer["weight_set_id"] == KEY.id
        assert answer["outcome"] == "OUTCOME_TRANSFER"


@pytest.mark.usefixtures("publisher")
def test_explain_takes_the_key_that_status_prints(run: Run) -> None:
    (weight_set,) = json.loads(run("status", "--json")[1])["weight_sets"]
    answer = json.loads(run("explain", json.dumps(weight_set["key"]), "--json")[1])
    assert answer["weight_set_id"] == KEY.id


@pytest.mark.usefixtures("publisher")
def test_explain_says_why(run: Run) -> None:
    code, out, _ = run("explain", KEY.id)
    assert code == 0
    for text in ("transfer:", "the publisher", "chosen"):
        assert text in out
    code, out, _ = run("explain", OTHER.canonical)
    assert code == 0
    for text in ("cold load:", f"near miss: {KEY.id} differs in revision"):
        assert text in out


@pytest.mark.usefixtures("publisher")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "give one of"),
        (("zz",), 2, "neither a weight set's id nor a key"),
        (("0" * 8,), 4, "no weight set's id starts with"),
        (("{",), 2, "not JSON"),
        (('{"model": ""}',), 2, "not a key"),
        (('{"model": "m", "colour": 1}',), 2, "not a key"),
        ((KEY.id, "--model", "m"), 2, "give one of"),
        (("--revision", "v1"), 2, "--model is missing"),
        (("--model", "m", "--attribute", "kernel"), 2, "NAME=VALUE"),
        (("--model-dir", "/nowhere"), 2, "/nowhere"),
    ],
)
def test_explain_says_what_is_wrong_with_a_key(run: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    found, out, err = run("explain", *arguments)
    assert (found, out) == (code, "")
    assert message in err


def test_an_id_that_starts_two_weight_sets_is_refused(publisher: BrokerClient, run: Run) -> None:
    keys = {}
    for number in range(64):
        key = WeightSetKey(f"model {number}")
        if key.id[0] in keys:
            break
        keys[key.id[0]] = key
    publisher.publish(keys[key.id[0]], tensors())
    publisher.publish(key, tensors())
    code, _, err = run("explain", key.id[0])
    assert code == 2
    assert "is the start of" in err


@pytest.mark.parametrize("command", ["status", "explain", "watch", "drain", "evict", "quarantine"])
def test_without_a_broker_every_command_says_so(run: Run, tmp_path: Path, command: str) -> None:
    needed = {"explain": ["0" * 32], "evict": ["publication-1"], "quarantine": ["publication-1", "--reason", "x"]}
    arguments = needed.get(command, [])
    code, out, err = run(command, *arguments, directory=tmp_path / "nothing")
    assert (code, out) == (3, "")
    assert "BROKER_UNAVAILABLE" in err
    assert "Traceback" not in err


def test_a_socket_that_nobody_serves_is_no_broker(broker: BrokerProcess, run: Run) -> None:
    broker.kill()
    assert run("status", "--timeout", "2")[0] == 3


def test_drain_ends_new_work(broker: BrokerProcess, run: Run, publisher: BrokerClient) -> None:
    code, out, _ = run("drain", "--timeout", "5")
    assert code == 0
    assert out.startswith("drained.")
    assert "DRAINING" in run("status")[1]
    assert json.loads(run("explain", KEY.id, "--json")[1])["outcome"] == "OUTCOME_DRAINING"
    with BrokerClient(broker.runtime_directory) as reader, pytest.raises(BrokerUnavailable, match=r"(?i)drain"):
        reader.acquire(KEY, tensors())


def test_a_drain_that_takes_a_while_says_what_runs(broker: BrokerProcess, run: Run, publisher: BrokerClient) -> None:
    with RawClient(broker.runtime_directory, "source") as source, RawClient(broker.runtime_directory) as receiver:
        source.publish()
        acquire = receiver.acquire()
        next(acquire)
        code, out, err = run("drain", "--timeout", "1.5")
        acquire.cancel()
    assert (code, out) == (1, "")
    assert "draining: 1 transfers running" in err
    assert "DRAIN_TIMEOUT" in err


def publications(run: Run) -> list[dict[str, Any]]:
    return [one for shown in json.loads(run("status", "--json")[1])["weight_sets"] for one in shown["publications"]]


@pytest.mark.usefixtures("publisher")
def test_evict_ends_one_publication(run: Run) -> None:
    [one] = publications(run)
    code, out, _ = run("evict", one["publication_id"])
    assert (code, out) == (0, f"evicted {one['publication_id']} of the publisher\n")
    assert publications(run) == []


@pytest.mark.usefixtures("publisher")
def test_quarantine_sets_one_publication_aside_and_shows_why(run: Run) -> None:
    [one] = publications(run)
    code, out, _ = run("quarantine", one["publication_id"], "--reason", "suspect \x1b[2J", "--json")
    assert code == 0
    assert json.loads(out)["publication"]["quarantine_reason"] == "suspect \x1b[2J"
    [left] = publications(run)
    assert (left["state"], left["quarantine_reason"]) == ("STATE_QUARANTINED", "suspect \x1b[2J")
    assert json.loads(run("explain", KEY.id, "--json")[1])["outcome"] != "OUTCOME_TRANSFER"


@pytest.mark.usefixtures("broker")
@pytest.mark.parametrize("arguments", [("evict", "nothing"), ("quarantine", "nothing", "--reason", "x")])
def test_a_publication_that_is_not_there_is_four(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (4, "")
    assert "PUBLICATION_NOT_FOUND" in err


def test_watch_prints_the_state_and_then_changes(broker: BrokerProcess, publisher: BrokerClient) -> None:
    with watching(broker) as lines:
        shown = until(lines, "= instance")
        assert any(f"= weight set {KEY.id} org/model: sources: the publisher resident" in line for line in shown)
        publication = publisher.publish(OTHER, tensors())
        until(lines, f"+ weight set {OTHER.id}")
        publication.retract()
        until(lines, f"- weight set {OTHER.id}")


def test_watch_as_json_prints_one_message_a_line(broker: BrokerProcess, publisher: BrokerClient) -> None:
    with watching(broker, "--json") as lines:
        first = json.loads(next(lines))
        assert first["snapshot"] is first["snapshot_start"] is True
        assert {name for change in first["changes"] for name in change} == {"weight_set", "instance"}


class watching:  # noqa: N801  (reads as a function)
    """The lines of a `watch` that runs as a process."""

    def __init__(self, broker: BrokerProcess, *arguments: str) -> None:
        command = [sys.executable, "-m", "weight_broker.cli.main", "watch", *arguments]
        command += ["--runtime-directory", str(broker.runtime_directory)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Iterator[str]:
        assert self._process.stdout is not None
        return iter(self._process.stdout)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def until(lines: Iterator[str], text: str) -> list[str]:
    found: list[str] = []
    for line in lines:
        found.append(line)
        if text in line:
            return found
    raise AssertionError(f"{text!r} never came; got {found}")


def test_watch_ends_with_the_broker(broker: BrokerProcess) -> None:
    command = [sys.executable, "-m", "weight_broker.cli.main", "watch"]
    process = subprocess.Popen(
        [*command, "--runtime-directory", str(broker.runtime_directory)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert "full state" in process.stdout.readline()
    broker.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 3)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "command", [[], ["status"], ["explain"], ["watch"], ["drain"], ["evict"], ["quarantine"], ["demo"]]
)
def test_help_documents_the_exit_codes(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([*command, "--help"])
    assert ended.value.code == 0
    assert "130  interrupted" in capsys.readouterr().out


def test_help_needs_neither_grpc_nor_rich_nor_torch() -> None:
    script = (
        "import sys\n"
        "for name in ('grpc', 'rich', 'torch', 'google.protobuf'): sys.modules[name] = None\n"
        "from weight_broker.cli.main import main\n"
        "main(['--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr


def test_a_reader_that_leaves_early_is_no_error(publisher: BrokerClient, broker: BrokerProcess) -> None:
    for number in range(300):
        publisher.publish(WeightSetKey(f"model {number}"), tensors())
    command = f"{sys.executable} -m weight_broker.cli.main status --json --runtime-directory {broker.runtime_directory}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--transfers", "0"], "from 1 to 1000"),
        (["status", "--timeout", "-1"], "above 0"),
        (["drain", "--timeout", "nan"], "above 0"),
        (["demo", "--instances", "x"], "invalid"),
        (["evict"], "required"),
        (["quarantine", "publication-1"], "required"),
        (["frobnicate"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_usage_is_two(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_json_is_valid_for_any_text(broker: BrokerProcess, run: Run) -> None:
    model: Any = 'a "quoted"\nmodel \u202e name'
    with BrokerClient(broker.runtime_directory, name="n") as client:
        client.publish(WeightSetKey(model), tensors())
        (weight_set,) = json.loads(run("status", "--json")[1])["weight_sets"]
        table = run("status")[1]
    assert weight_set["key"]["model"] == model
    assert "\u202e" not in table
