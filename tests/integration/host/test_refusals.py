"""The wrong weights never load: what does not fit is refused by name, before a byte is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest

from support import actions
from support.broker_process import BrokerProcess
from weight_broker import (
    BrokerClient,
    InvalidArgument,
    LayoutMismatch,
    ParallelRank,
    WeightSetKey,
    WeightsNotFound,
)
from weight_broker.key import Role, Stage

torch = pytest.importorskip("torch")

KEY = WeightSetKey("org/model.v1", revision="main", checkpoint_digest="aa", rank=ParallelRank(0, 2))
SOURCE = {
    "linear.weight": torch.arange(32, dtype=torch.float32).reshape(4, 8),
    "linear.bias": torch.arange(8, dtype=torch.bfloat16),
    "norm.weight": torch.ones(8, dtype=torch.float16),
}


@pytest.fixture
def publisher(broker: BrokerProcess) -> Iterator[BrokerClient]:
    with BrokerClient(broker.runtime_directory, name="publisher") as client:
        client.publish(KEY, SOURCE)
        yield client


@pytest.fixture
def receiver(broker: BrokerProcess) -> Iterator[BrokerClient]:
    with BrokerClient(broker.runtime_directory, name="receiver") as client:
        yield client


def fresh() -> dict[str, object]:
    return {name: torch.full_like(tensor, 3) for name, tensor in SOURCE.items()}


def bytes_of(tensors: Mapping[str, object]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}  # type: ignore[attr-defined]


def without_norm(tensors: dict[str, object]) -> None:
    del tensors["norm.weight"]


def with_extra(tensors: dict[str, object]) -> None:
    tensors["extra"] = torch.zeros(2)


def wrong_dtype(tensors: dict[str, object]) -> None:
    tensors["linear.bias"] = torch.zeros(8, dtype=torch.float16)


def wrong_shape(tensors: dict[str, object]) -> None:
    tensors["linear.weight"] = torch.zeros(8, 4)


def wrong_stride(tensors: dict[str, object]) -> None:
    tensors["linear.weight"] = torch.zeros(8, 4).t()


def wrongly_tied(tensors: dict[str, object]) -> None:
    tensors["norm.weight"] = tensors["linear.bias"] = torch.zeros(8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_norm, "norm.weight: missing from the receiver's tensors"),
        (with_extra, "extra: not in the resident weight set"),
        (wrong_dtype, "linear.bias.dtype: resident bfloat16, wanted float16"),
        (wrong_shape, "linear.weight.shape: resident 4x8, wanted 8x4"),
        (wrong_stride, "linear.weight.stride: resident 8x1, wanted 1x4"),
        (wrongly_tied, "norm.weight.alias_of: resident none, wanted linear.bias"),
    ],
)
def test_another_layout_is_refused_by_field_and_nothing_is_written(
    publisher: BrokerClient,
    receiver: BrokerClient,
    change: Callable[[dict[str, object]], None],
    named: str,
) -> None:
    tensors = fresh()
    change(tensors)
    before = bytes_of(tensors)
    with pytest.raises(LayoutMismatch) as refused:
        receiver.acquire(KEY, tensors)
    assert named in refused.value.metadata["differences"]
    assert named in str(refused.value)
    assert not refused.value.touched
    assert refused.value.quiesced
    assert bytes_of(tensors) == before


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, model="org/model.v2"),
        replace(KEY, revision="other"),
        replace(KEY, checkpoint_digest="bb"),  # a fine-tune of the same shape
        replace(KEY, dtype="float16"),
        replace(KEY, quantization="fp8"),
        replace(KEY, role=Role.DRAFT),
        replace(KEY, stage=Stage.RUNTIME),
        replace(KEY, rank=ParallelRank(1, 2)),
        replace(KEY, rank=ParallelRank(0, 4)),
        replace(KEY, rank=ParallelRank(0, 2, data_parallel_rank=1, data_parallel_size=2)),
        replace(KEY, engine_attributes={"weight_nz_mode": "1"}),
    ],
)
def test_another_key_is_a_miss_and_nothing_is_written(
    publisher: BrokerClient, receiver: BrokerClient, other: WeightSetKey
) -> None:
    tensors = fresh()
    before = bytes_of(tensors)
    with pytest.raises(WeightsNotFound) as refused:
        receiver.acquire(other, tensors)
    assert not refused.value.touched
    assert bytes_of(tensors) == before


@pytest.mark.parametrize("model", ["a/b.c", "../../etc/passwd", "模型 🤖", 'quo"te\n\0', "x" * 4096, " "])
def test_a_key_may_have_any_characters(broker: BrokerProcess, model: str) -> None:
    key = WeightSetKey(model, revision=model)
    with BrokerClient(broker.runtime_directory) as client:
        client.publish(key, SOURCE)
        tensors = fresh()
        assert client.acquire(key, tensors).tensor_count == 3
        assert bytes_of(tensors) == bytes_of(SOURCE)


@pytest.mark.parametrize(
    ("tensor", "hint"),
    [
        (torch.zeros(4, device="meta"), "meta"),
        (torch.zeros(1, 4).expand(4, 4), "contiguous"),
        (torch.zeros(4, 4).to_sparse(), "sparse"),
        (np.zeros(4, dtype=">f4"), "byte order|endian"),
        (np.zeros(4, dtype=object), "dtype"),
        ("not a tensor", "Tensor"),
    ],
)
def test_a_tensor_that_cannot_be_shared_is_refused_by_name(receiver: BrokerClient, tensor: object, hint: str) -> None:
    with pytest.raises(InvalidArgument, match=f"(?s)odd.*({hint})"):
        receiver.publish(KEY, {"odd": tensor})
    with pytest.raises(InvalidArgument, match=r"(?s)odd"):
        receiver.acquire(KEY, {"odd": tensor})


def test_no_tensors_are_refused(receiver: BrokerClient) -> None:
    with pytest.raises(InvalidArgument, match="at least one tensor"):
        receiver.publish(KEY, {})


def test_read_only_tensors_can_be_published_but_not_filled(receiver: BrokerClient) -> None:
    array = np.arange(8, dtype=np.float32)
    array.flags.writeable = False
    receiver.publish(KEY, {"frozen": array})
    with pytest.raises(InvalidArgument, match=r"(?s)frozen.*(read-only|writeable)"):
        receiver.acquire(KEY, {"frozen": array})


def test_explain_and_acquire_agree(broker: BrokerProcess, publisher: BrokerClient) -> None:
    from weight_broker.v1 import inspection_service_pb2 as inspection
    from weight_broker.wire import key_to_wire

    near = replace(KEY, revision="other")
    explained = broker.inspection.Explain(inspection.ExplainRequest(key=key_to_wire(near)))
    assert explained.outcome == inspection.ExplainResponse.OUTCOME_COLD_LOAD
    assert list(explained.near_misses[0].differing_fields) == ["revision"]
    explained = broker.inspection.Explain(inspection.ExplainRequest(weight_set_id=KEY.id))
    assert explained.outcome == inspection.ExplainResponse.OUTCOME_TRANSFER
    assert [candidate.chosen for candidate in explained.candidates] == [True]


def test_the_expected_checksum_depends_on_every_byte() -> None:
    content = actions.content(1, 2, 64)
    before = actions.checksum(content)
    content["layers.1.weight"].view(np.uint8)[63] ^= 1
    assert actions.checksum(content) != before
