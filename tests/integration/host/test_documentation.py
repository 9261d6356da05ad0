"""The documents say what the code does: their examples run, their tables are complete, what they point to exists."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file

from support.broker_process import BrokerProcess
from support.documents import REPOSITORY, Command, Document, Reader, commands_in, matches
from weight_broker.cli import failure
from weight_broker.demo.checkpoint import ensure_checkpoint
from weight_broker.drivers import ascend_requirements, hdk
from weight_broker.errors import TABLE
from weight_brokerd import __main__ as daemon
from weight_brokerd.config import loading as config
from weight_brokerd.core.publications import TRANSITIONS

NAMES = ("README.md", *sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("docs/**/*.md")))
DOCUMENTS = {name: Document(name) for name in NAMES}
ARCHITECTURE, ERRORS, OPERATIONS = (DOCUMENTS[f"docs/{name}.md"] for name in ("ARCHITECTURE", "ERRORS", "OPERATIONS"))
STATES, BUDGETS = (DOCUMENTS[f"docs/design/{name}.md"] for name in ("leases-and-groups", "benchmarks"))

NOT_RUN = {
    r"sudo .*": "needs root and changes the machine; tests/e2e boots the unit under a systemd of its own",
    r"systemctl .*": "needs a host that systemd has booted; see tests/e2e",
    r"journalctl .*": "needs a host that systemd has booted; see tests/e2e",
    r"cd deploy/systemd": "prepares commands that are not run",
    r"pip install 'weight-broker\[broker,cli\]'": "needs a package index that has it; tests/e2e installs the wheel",
    r"docker (run|exec) .*": "needs Ascend's images and devices",
    r"source /usr/local/Ascend/.*": "needs CANN",
    r"(python3 -m venv|/opt/weight-broker/bin/pip install) .*": "for a container; tests/e2e installs the wheel",
    r"pip install weight-broker": "needs a package index that has it; tests/e2e installs the wheel",
    r"ASCEND_RT_VISIBLE_DEVICES=. vllm serve .*": "needs an NPU and vLLM",
    r"vllm serve .*": "needs vLLM; tests/e2e/vllm runs engines with the same load format",
    r"sglang serve .*": "needs SGLang; tests/e2e/sglang runs its loaders with the same load format",
    r"(TMPDIR=\S+ )?weight-broker demo --device npu .*": "needs NPUs; tests/integration/cann runs it on a double",
    r"deploy/ascend-check.sh .*": "needs NPUs; tests/integration/cann/test_ascend_check.py has a double",
}
"""Commands that cannot run in a test, each with the reason. All others run."""

if shutil.which("grpcurl", path=os.path.dirname(sys.executable)) is None:
    NOT_RUN[r"grpcurl .*"] = "has a package for x86_64 only; the same is asked with buf curl"

RUN_INSTEAD = {
    "make demo": "make --dry-run demo",  # takes minutes and gigabytes; the demo has tests of its own
    "make test": "make --dry-run test",  # this is part of it
    "make torture": "make --dry-run torture",  # minutes; tests/integration/host/test_campaign.py is a short one
    "make torture TORTURE_ARGUMENTS='--seed 7 --seconds 3600 --seats 8'": "make --dry-run torture",  # an hour
    "make fuzz": "make --dry-run fuzz",  # needs atheris; tests/fuzzing feeds the same parsers
    "make demo-ascend-double": "make --dry-run demo-ascend-double",  # minutes; tests/integration/cann runs the same
    # Without an end of its own.
    "weight-broker watch": "timeout --preserve-status --signal=INT 3 weight-broker watch || test $? = 130",
}
"""Commands that run in another form."""

FENCES = {"console", "python", "mermaid", "toml", "text"}
"""All but drawings (`mermaid`, `text`) are run."""
PLACES = {"benchmarks", "broker", "client", "deploy", "docs", "proto", "tests", "weight_broker", "weight_brokerd"}
ROOTS = (REPOSITORY, REPOSITORY / "client", REPOSITORY / "broker")


def cannot_run(command: Command) -> bool:
    return any(re.fullmatch(pattern, command.line) for pattern in NOT_RUN)


def unquoted(cell: str) -> str:
    return cell.strip("`")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples call /models."""
    directory = tmp_path_factory.mktemp("models")
    (directory / "linear").mkdir()
    weights = {"weight": numpy.ones((512, 512), "float32"), "bias": numpy.zeros(512, "float32")}
    save_file(weights, directory / "linear/model.safetensors")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(directory))
        (directory / "qwen2").symlink_to(ensure_checkpoint(4 << 20, lambda done, size: None))
    return directory


@pytest.fixture
def reader(tmp_path: Path, models: Path) -> Iterator[Reader]:
    """A reader with a checkout, and models on the disk."""
    reader = Reader(tmp_path, {"/models/": f"{models}/"})
    yield reader
    reader.leave()


# Examples


@pytest.mark.parametrize("name", [name for name, document in DOCUMENTS.items() if document.examples])
def test_everything_that_a_document_shows_works_from_top_to_bottom(name: str, reader: Reader, tmp_path: Path) -> None:
    for language, block in DOCUMENTS[name].examples:
        assert language in FENCES, f"```{language}: say what it is, so that it is run"
        assert language != "text" or "$ " not in block, "a drawing is not run: put the commands into a console"
        if language == "python":
            reader.paste(block)
        if language == "toml":
            (tmp_path / "shown.toml").write_text(block)
            assert config.load(tmp_path / "shown.toml", {}) != config.Config()
        for command in commands_in(block) if language == "console" else ():
            if not cannot_run(command):
                reader.type(Command(RUN_INSTEAD.get(command.line, command.line), command.output))


def test_the_lists_of_commands_that_are_not_run_have_nothing_that_no_document_shows() -> None:
    shown = [command for document in DOCUMENTS.values() for command in document.commands]
    assert [line for line in NOT_RUN if not any(re.fullmatch(line, command.line) for command in shown)] == []
    assert RUN_INSTEAD.keys() <= {command.line for command in shown}


def test_shown_output_is_compared_except_where_it_has_dots() -> None:
    assert matches("one ... three\n...\n", "one two three  \nfour\nfive\n")
    assert not matches("one ... three\n", "one two four\n")
    assert not matches("one\n", "one\ntwo\n")


# Tables


def test_errors_lists_every_reason_with_its_code_its_exception_and_its_recovery() -> None:
    rows = {unquoted(row[0]): row[1:] for row in ERRORS.table("Reason")}
    assert rows.keys() == {str(reason) for reason in TABLE}
    for reason, row in TABLE.items():
        code, exception, meaning, recovery = rows[str(reason)]
        assert (unquoted(code), unquoted(exception)) == (row.code, row.exception.__name__), reason
        assert meaning, reason
        assert row.recovery in recovery, reason


@pytest.mark.parametrize(
    ("heading", "codes"),
    [("Exit statuses of weight-brokerd", daemon.ExitCode), ("Exit statuses of weight-broker", failure.ExitCode)],
)
def test_errors_lists_every_exit_status(heading: str, codes: type[daemon.ExitCode | failure.ExitCode]) -> None:
    rows = ERRORS.table("Status", below=heading)
    assert [int(row[0]) for row in rows] == sorted(codes)
    assert all(row[1] for row in rows)


def test_operations_lists_every_setting_with_its_default_and_its_variable() -> None:
    listed = {
        unquoted(row[0]): (ast.literal_eval(unquoted(row[1])), unquoted(row[2])) for row in OPERATIONS.table("Setting")
    }
    settings = [
        (f"{section.name}.{setting.name}", config.environment_variable(section.name, setting.name), setting)
        for section in fields(config.Config)
        for setting in fields(getattr(config.Config(), section.name))
    ]
    defaults = {
        key: list(setting.default) if isinstance(setting.default, tuple) else setting.default
        for key, _, setting in settings
    }
    assert listed == {key: (defaults[key], variable) for key, variable, _ in settings}
    other_variables = [setting.metadata["also"] for _, _, setting in settings if setting.metadata["also"]]
    assert set(other_variables) <= set(OPERATIONS.code_spans)


def test_operations_lists_every_metric_with_its_labels(start_broker: Callable[..., BrokerProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start_broker(WEIGHT_BROKER_METRICS_LISTEN=address).host()
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): set(family.samples[0].labels) - {"le"}
        for family in families
        if not family.name.endswith("_created")
    }
    assert {unquoted(row[0]): set(re.findall(r"`(\w+)`", row[1])) for row in OPERATIONS.table("Metric")} == exposed


def test_operations_lists_every_audit_event() -> None:
    sources = [path.read_text() for path in (REPOSITORY / "broker").rglob("*.py")]
    written = {name for source in sources for name in re.findall(r'\baudit\(\s*"(\w+)"', source)}
    assert written
    assert {unquoted(row[0]) for row in OPERATIONS.table("Event")} == written


def test_operations_lists_extras_that_the_wheel_has() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys() - {"ascend", "dev"}
    assert {unquoted(row[0]) for row in OPERATIONS.table("Wheel extra")} == extras | {"(none)"}


def test_ascend_lists_the_floors_that_the_broker_checks() -> None:
    oldest = {row[0]: row[1].lower() for row in DOCUMENTS["docs/ASCEND.md"].table("Part")}
    assert oldest["Driver and firmware (HDK)"] == hdk.SHARING_FLOOR
    assert oldest["Driver, for expandable segments"] == hdk.CHUNK_SHARING_FLOOR
    assert oldest["CANN of the broker"] == ascend_requirements.CANN_FLOOR
    assert oldest["openyuanrong-datasystem"] == ".".join(map(str, ascend_requirements.DATASYSTEM_FLOOR))
    [libc] = [floor for part, floor in oldest.items() if part.startswith("glibc")]
    assert libc == ".".join(map(str, ascend_requirements.GLIBC_FLOOR))


def test_architecture_draws_every_room_on_its_floor() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    [contract] = [item for item in project["tool"]["importlinter"]["contracts"] if item["type"] == "layers"]
    floors = [re.split(r" *[|:] *", layer) for layer in contract["layers"]]
    [drawing] = (block for language, block in ARCHITECTURE.examples if language == "text")
    client, daemon = rooms_in(drawing)
    for package, drawn in (("weight_broker", client), ("weight_brokerd", daemon)):
        listed = {name.removeprefix(f"{package}."): floor for floor, names in enumerate(floors) for name in names}
        expected = {room: floor for room, floor in listed.items() if "." not in room}
        assert sorted(drawn) == sorted(expected)
        assert [expected[room] for room in drawn] == sorted(expected.values()), "the floors from top to bottom"


def test_architecture_can_be_read_in_one_sitting() -> None:
    assert len(ARCHITECTURE.text.splitlines()) <= 130


def test_the_states_of_a_publication_are_drawn_as_they_are() -> None:
    drawing = next(block for language, block in STATES.examples if language == "mermaid")
    drawn = set(re.findall(r"^ *(\w+) --> (\w+)", drawing, re.MULTILINE))
    assert drawn == {(str(begin), str(end)) for begin, ends in TRANSITIONS.items() for end in ends}


def test_every_budget_has_a_benchmark_and_every_benchmark_a_budget() -> None:
    module = ast.parse((REPOSITORY / "benchmarks/__main__.py").read_text())
    values = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("BENCHMARKS", "ON_REQUEST")
    ]
    named = {name for value in values for name in ast.literal_eval(value)}
    assert {unquoted(row[2]) for row in BUDGETS.table("What")} == named


def test_documents_install_the_versions_that_the_tests_run_with() -> None:
    groups = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["dependency-groups"]
    pinned = dict(
        requirement.split("==") for name in ("torch", "datasystem", "vllm", "sglang") for requirement in groups[name]
    )
    shown = [found for document in DOCUMENTS.values() for found in re.findall(r"([\w-]+)==([\w.]+)", document.text)]
    assert [(name, version) for name, version in shown if pinned.get(name) != version] == []
    assert shown


# References


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_somewhere(name: str) -> None:
    document = DOCUMENTS[name]
    for target in document.links:
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        path = (document.path.parent / file).resolve() if file else document.path
        assert path.exists(), target
        if anchor:
            assert anchor in Document(str(path.relative_to(REPOSITORY))).anchors, target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_file_and_function_that_a_document_names_exists(name: str) -> None:
    assert [problem for span in references(name) if (problem := missing(span))] == []


def test_architecture_names_enough_functions_to_follow_a_call() -> None:
    assert sum(bool(re.fullmatch(r"weight_brokerd?/[\w/]+\.py:[\w.]+", span)) for span in ARCHITECTURE.code_spans) > 30


def references(name: str) -> list[str]:
    """Files of this project, and functions in them ("file:function"), that a document names."""
    spans = [(span, span.partition(":")[0]) for span in DOCUMENTS[name].code_spans]
    return [span for span, path in spans if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", path) and path.split("/")[0] in PLACES]


def missing(span: str) -> str:
    """What of a reference does not exist; "" if all of it does."""
    path, _, symbol = span.partition(":")
    found = [root / path for root in ROOTS if (root / path).exists()]
    if not found:
        return f"{span}: there is no such file"
    return f"{span}: it has no such definition" if symbol and symbol not in defined_in(found[0]) else ""


def rooms_in(drawing: str) -> tuple[list[str], list[str]]:
    """The rooms of the client and of the daemon, from top to bottom: the first column of every cell."""
    client: list[str] = []
    daemon: list[str] = []
    for line in drawing.splitlines():
        cells = line.strip().split("|")[1:-1]
        # Left and right of the sockets; what both sides share is the client's.
        for cell, rooms in zip(cells[::2], (client, daemon), strict=False):
            first_column = re.split(r"\s{2,}", cell.removeprefix(" "))[0]
            rooms.extend(first_column.replace(":", " ").split())
    return client, daemon


def defined_in(path: Path) -> set[str]:
    """Names of the functions, classes and methods in a module, methods with their class's."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: Callable[[str], str]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix(node.name))
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.{{}}".format)

    visit(ast.parse(path.read_text()).body, str)
    return names
