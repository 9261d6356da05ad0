"""Parts of the demo on cards and of `ascend-check` that need no card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from weight_broker.cli.failure import CommandError, ExitCode
from weight_broker.cli.main import main
from weight_broker.demo.npu import memory as npu_memory
from weight_broker.demo.npu.report import CardReport, bytes_per_second
from weight_broker.demo.npu.run import prefix_of
from weight_broker.demo.orders import CardResult
from weight_broker.integrations.checkpoint import CheckpointError
from weight_broker.layout import ITEM_SIZES
from weight_brokerd.ascend_check.steps import Row, StepFailedError, Steps

DISK = CardResult("instance 1", "npu:0", "disk", "", "read", 1000, 2, 0.1, 0.1, 2.0, 1.0, {}, 0.5, 1000, "")
PHASES = {"attach": 0.01, "reserve": 0.01, "map": 0.2, "transfer": 0.1, "verify": 0.05, "confirm": 0.01}
PEER = replace(
    DISK, name="instance 2", device_id="npu:1", source="instance 1", data_plane="datasystem", path="copy",
    ready_seconds=0.4, disk_seconds=0.0, phases=PHASES,
)  # fmt: skip
WARM = replace(DISK, name="warm disk")
GOOD = CardReport(DISK, WARM, (PEER,), {"instance 1": "aa", "instance 2": "aa"}, "aa", [], 0.0)


def test_a_run_in_which_all_is_identical_has_no_failures() -> None:
    assert GOOD.failures() == []
    assert GOOD.speed_up(PEER, DISK) == 5
    assert bytes_per_second(PEER) == 1000 / 0.1
    assert bytes_per_second(DISK) == 1000
    disk, _, peer = GOOD.rows()
    assert "digest" not in disk
    assert (peer["plane"], peer["path"], peer["map"], peer["move"], peer["verify"], peer["x cold"]) == (
        "datasystem", "copy", "200 ms", "100 ms", "50 ms", "5.00",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (replace(GOOD, digests={"instance 1": "aa", "instance 2": "bb"}), "instance 2: what is on its card differs"),
        (replace(GOOD, digests={"instance 1": "aa"}), "instance 2: its card was not read back"),
        (replace(GOOD, expected="cc"), "instance 1: what is on its card differs"),
        (replace(GOOD, changed=["instance 2"]), "instance 2: its memory changed"),
        (replace(GOOD, others=(replace(PEER, source="disk"),)), "instance 2: it read the disk"),
        (replace(GOOD, others=(replace(PEER, problems=["no broker"]),)), "instance 2: no broker"),
    ],
)
def test_whatever_is_wrong_is_a_failure_with_a_name(report: CardReport, words: str) -> None:
    assert any(failure.startswith(words) for failure in report.failures())


def test_digests_of_a_checkpoint_depend_on_names_and_bytes_and_not_on_the_order(tmp_path: Path) -> None:
    save_file({"a": numpy.arange(10, dtype="float32"), "b": numpy.ones(3, "int8")}, tmp_path / "model.safetensors")
    tensors = npu_memory.checkpoint(tmp_path)
    whole = npu_memory.digest((one.name, npu_memory.file_content(one)) for one in tensors)
    turned = npu_memory.digest((one.name, npu_memory.file_content(one)) for one in reversed(tensors))
    assert whole == turned
    contents = {"a": numpy.arange(10, dtype="float32").tobytes(), "b": b"\x01\x01\x01"}
    assert npu_memory.digest((name, iter([content])) for name, content in contents.items()) == whole
    assert npu_memory.digest((name, iter([content[:-1] + b"x"])) for name, content in contents.items()) != whole
    assert npu_memory.digest((name, iter([contents["b"]])) for name in ("a", "b")) != whole


def test_a_checkpoint_with_a_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(
        len(header := b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}').to_bytes(8, "little") + header + b"x"
    )
    with pytest.raises(CheckpointError, match="'a' has type F4"):
        npu_memory.checkpoint(tmp_path)


def test_every_type_of_a_checkpoint_is_one_of_a_layout() -> None:
    assert set(npu_memory.TYPES.values()) <= ITEM_SIZES.keys()


def test_a_step_that_cannot_be_done_is_a_row_with_its_reason() -> None:
    steps = Steps()

    def refuse() -> list[float]:
        raise StepFailedError("source: the driver says no")

    assert steps.measure("copy", lambda: [3.0, 1.0, 2.0], 6)
    assert not steps.measure("import", refuse)
    assert steps.rows[0].median == 2.0
    assert steps.failures() == [Row("import", problem="source: the driver says no")]


def test_the_command_of_instances_is_split_as_a_shell_does() -> None:
    assert prefix_of(None) == []
    assert prefix_of("env 'A=b c' X={card}") == ["env", "A=b c", "X={card}"]


@pytest.mark.parametrize(
    ("command", "words"),
    [("env 'A", "is no command: No closing quotation"), ("no-such-command 1", "'no-such-command'")],
)
def test_a_command_that_cannot_start_instances_is_refused_before_a_broker_starts(command: str, words: str) -> None:
    with pytest.raises(CommandError, match=words) as refused:
        prefix_of(command)
    assert refused.value.code is ExitCode.USAGE


def test_a_command_for_instances_goes_with_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--run-in", "env"]) == ExitCode.USAGE
    assert "it needs --device npu" in capsys.readouterr().err
