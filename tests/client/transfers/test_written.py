"""What a load has written, and what it left over: only that which was read becomes a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from support.scripted_broker import Context, ScriptedBroker
from weight_broker import BrokerClient, LoadReport, WeightSetKey
from weight_broker.integrations.torch import materialise_empty, tensors_of
from weight_broker.transfers.written import TensorSource, Watch
from weight_broker.v1 import resources_pb2
from weight_broker.v1 import weight_broker_service_pb2 as pb

KEY = WeightSetKey("model")
SIZE = 1000


def random_array() -> Any:
    return np.random.default_rng(0).random(SIZE, np.float32)


def refused(source: TensorSource, load: Callable[[], object], after: Mapping[str, object] | None = None) -> str:
    """Why what is there after the load is not published; empty if it is."""
    watch = Watch(source)
    load()
    present = after if after is not None else source() if callable(source) else source
    return watch.refusal(present)


@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.fill_(0),
        lambda tensor: tensor.copy_(tensor.clone()),
        lambda tensor: tensor.data.fill_(7),
        lambda tensor: tensor.numpy().fill(7),
        lambda tensor: setattr(tensor, "data", tensor.clone()),
    ],
    ids=["zeros over zeros", "the same over the same", "through data", "through NumPy", "other memory"],
)
def test_any_way_to_write_a_tensor_counts(write: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.zeros(SIZE)
    assert refused({"w": tensor}, lambda: write(tensor)) == ""


@pytest.mark.parametrize(
    "content", [torch.rand(SIZE), torch.zeros(SIZE), torch.zeros(10, 10)], ids=["random", "0", "2d"]
)
def test_a_tensor_that_was_left_alone_is_named(content: torch.Tensor) -> None:
    read, left = torch.zeros(SIZE), content.clone()
    tensors = {"read": read, "left.over": left}
    assert "did not write 1 of 2 tensors (left.over)" in refused(tensors, lambda: read.add_(1))


def test_new_objects_over_the_same_memory_are_not_written() -> None:
    tensor, other = torch.rand(SIZE), torch.rand(SIZE)
    assert "(w)" in refused(lambda: {"w": tensor.data, "x": other.data}, lambda: other.add_(1))


def test_a_tensor_that_was_replaced_by_one_of_the_same_content_is_written() -> None:
    model = {"w": torch.rand(SIZE)}
    kept = model["w"]
    assert refused(lambda: model, lambda: model.update(w=kept.clone())) == ""


def test_an_array_has_no_version_and_a_changed_byte_shows_it() -> None:
    first, second = random_array(), random_array()
    assert "(second)" in refused({"first": first, "second": second}, lambda: first.fill(1))
    assert refused({"first": first}, lambda: first.fill(2)) == ""


def test_a_constant_array_may_be_written_over_with_itself_beside_others() -> None:
    weight, bias = random_array(), np.zeros(SIZE, np.float32)

    def load() -> None:
        weight.fill(4)
        bias.fill(0)

    assert refused({"weight": weight, "bias": bias}, load) == ""
    assert "(bias)" in refused({"bias": bias}, lambda: bias.fill(0)), "nothing shows that anything was read"


def test_a_constant_vector_may_be_written_over_with_itself_where_the_tensors_are_looked_up_again() -> None:
    weight, bias = torch.rand(4, 4), torch.zeros(SIZE)

    def load() -> None:
        weight.data.fill_(4)
        bias.data.fill_(0)

    assert refused(lambda: {"weight": weight, "bias": bias}, load) == ""
    weight.data.fill_(5)
    assert "(bias)" in refused({"weight": weight, "bias": bias}, load), "the model may have another one by now"


def test_tensors_of_inference_mode_are_judged_by_their_content() -> None:
    with torch.inference_mode():
        read, left = torch.rand(SIZE), torch.rand(SIZE)
        assert "(left)" in refused({"read": read, "left": left}, lambda: read.fill_(1))


def test_tensors_without_memory_before_the_load_are_read_by_it() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    state: dict[str, Any] = nn.Linear(4, 4).state_dict()
    assert refused(lambda: tensors_of(module), lambda: module.load_state_dict(state, assign=True)) == ""


class Model(nn.Module):
    """Weights, and buffers that no checkpoint has."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.rand(8), persistent=False)
        self.plain = torch.rand(8)


def checkpoint(*, without: str = "nothing") -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {name: tensor for name, tensor in Model().state_dict().items() if not name.startswith(without)}


@pytest.mark.parametrize("assign", [False, True])
def test_a_module_is_what_it_has_after_the_load(assign: bool) -> None:
    module = Model()
    tensors = tensors_of(module)
    watch = Watch(tensors)
    module.load_state_dict(checkpoint(), assign=assign)
    assert watch.refusal(tensors.current()) == ""
    assert torch.equal(tensors.current()["first.weight"], checkpoint()["first.weight"])


def test_a_part_of_a_module_that_the_checkpoint_lacks_is_named() -> None:
    module = Model()
    load = lambda: module.load_state_dict(checkpoint(without="last"), strict=False)  # noqa: E731
    assert "(last.bias, last.weight)" in refused(lambda: tensors_of(module), load)


def test_memory_that_nothing_was_read_into_is_not_taken_for_zeros() -> None:
    with torch.device("meta"):
        module = Model()
    materialise_empty(module)
    names = "first.bias, first.weight, last.bias, last.weight"
    assert names in refused(lambda: tensors_of(module), lambda: None)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[ScriptedBroker]:
    """Grants every caller the lease to load."""
    scripted = ScriptedBroker(tmp_path).start()
    lease = resources_pb2.ColdLoadLease(weight_set_id=KEY.id, fencing_token=9)

    def play(request: pb.AcquireRequest, context: Context) -> Iterator[pb.AcquireResponse]:
        yield pb.AcquireResponse(cold_load=pb.ColdLoad(cold_load_lease=lease))

    scripted.on_acquire = play
    yield scripted
    scripted.stop()


def load_through(broker: ScriptedBroker, source: TensorSource, read: Callable[[], None]) -> LoadReport:
    with BrokerClient(broker.directory) as client:
        return client.acquire_or_load(KEY, source, read)


def test_a_stale_mapping_is_not_published_and_all_others_load_from_disk(broker: ScriptedBroker) -> None:
    module = Model()
    stale = dict(tensors_of(module))

    def read() -> None:
        module.load_state_dict(checkpoint(), assign=True)

    report = load_through(broker, stale, read)
    assert report.publication is None
    assert "PublishRefused: the load did not write 6 of 6 tensors" in (report.publish_error or "")
    assert broker.publish_requests.empty()
    given_up = broker.load_reports.get(timeout=60).give_up
    assert given_up.unpublishable, "every instance runs the same load"


def test_the_tensors_of_a_module_are_looked_up_again(broker: ScriptedBroker) -> None:
    module = Model().double()

    def read() -> None:
        module.float()
        module.load_state_dict(checkpoint(), assign=True)

    assert load_through(broker, tensors_of(module), read).publish_error is None
    published = broker.publish_requests.get(timeout=60).layout.tensors
    assert {tensor.dtype for tensor in published} == {"float32"}
