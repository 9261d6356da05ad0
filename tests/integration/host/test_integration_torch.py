"""Plain modules are filled through the broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from support.broker_process import BrokerProcess
from weight_broker import BrokerClient, InvalidArgument, LayoutMismatch, WeightSetKey, WeightsNotFound
from weight_broker.integrations.torch import (
    assign_tensors,
    attach_module,
    load_module,
    materialise_empty,
    tensors_of,
)

KEY = WeightSetKey("module", dtype="float32")
NewClient = Callable[[], BrokerClient]


class Tied(nn.Module):
    """Two names for one weight, a buffer in the state dict and one that is not."""

    scale: torch.Tensor

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.output = nn.Linear(width, 10, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.output(self.norm(self.embedding(tokens)) * self.scale)
        return result


@pytest.fixture
def new_client(broker: BrokerProcess) -> Iterator[NewClient]:
    """Makes clients, each an instance of its own to the broker."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(BrokerClient(broker.runtime_directory))


def trained(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    module = Tied()
    with torch.no_grad():
        for tensor in tensors_of(module).values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    return module.eval()


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied().eval()


def answers(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(torch.arange(10))
    return result


def fail() -> None:
    pytest.fail("the disk was read")


def test_a_weight_set_has_every_name_and_every_buffer() -> None:
    module = trained()
    tensors = tensors_of(module)
    assert tensors["output.weight"] is tensors["embedding.weight"]
    assert set(tensors) == set(module.state_dict()) | {"scale"}


def test_the_second_module_is_filled_from_the_first(new_client: NewClient) -> None:
    source, first, second = trained(), trained(1), trained(2)

    def load() -> None:
        first.load_state_dict(source.state_dict())
        first.scale.copy_(source.scale)

    assert load_module(first, KEY, load, new_client()).source == "disk"
    assert load_module(second, KEY, fail, new_client()).source == "peer"
    for module in (first, second):
        assert torch.equal(answers(module), answers(source))


def test_a_load_may_replace_the_tensors(new_client: NewClient) -> None:
    source, first, second = trained(), trained(1), trained(2)
    load_module(first, KEY, lambda: void(first.load_state_dict(source.state_dict(), assign=True)), new_client())
    load_module(second, KEY, fail, new_client())
    for name in source.state_dict():
        assert torch.equal(tensors_of(second)[name], tensors_of(source)[name])


def void(value: object) -> None:
    """For lambdas that have to return nothing."""


def test_what_a_load_raises_passes_through_and_leaves_no_lease(broker: BrokerProcess, new_client: NewClient) -> None:
    def load() -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        load_module(trained(), KEY, load, new_client())
    assert broker.host().cold_load_lease_count == 0


def test_a_module_without_memory_takes_the_resident_weights(new_client: NewClient) -> None:
    source = trained().requires_grad_(False)
    client = new_client()
    client.publish(KEY, tensors_of(source))
    module = on_meta()
    report = attach_module(module, KEY, new_client())
    assert report.path == "zero_copy"
    assert torch.equal(answers(module), answers(source))
    assert module.output.weight is module.embedding.weight
    assert module.state_dict().keys() == source.state_dict().keys(), "a buffer changed its kind"
    assert all(parameter.requires_grad for parameter in module.parameters()), "as of the module, whatever the source's"


def test_a_module_that_does_not_fit_stays_as_it_is(new_client: NewClient) -> None:
    client = new_client()
    client.publish(KEY, tensors_of(trained()))
    with torch.device("meta"):
        module = Tied(width=7)
    with pytest.raises(LayoutMismatch, match=r"norm\.weight\.shape: has \(6,\), wanted \(7,\)"):
        attach_module(module, KEY, new_client())
    assert all(tensor.is_meta for tensor in tensors_of(module).values())


def test_weights_that_nobody_has_are_not_found(new_client: NewClient) -> None:
    with pytest.raises(WeightsNotFound):
        attach_module(on_meta(), KEY, new_client())


def test_missing_extra_and_wrong_tensors_are_named() -> None:
    module = trained()
    given: dict[str, object] = dict(tensors_of(module))
    del given["scale"]
    given["more"] = torch.zeros(1)
    given["norm.bias"] = torch.zeros(6, dtype=torch.float64)
    before = answers(module)
    with pytest.raises(LayoutMismatch) as caught:
        assign_tensors(module, given)
    for text in ("scale: not among the tensors", "more: not in the module", "norm.bias.dtype: has torch.float64"):
        assert text in caught.value.metadata["differences"]
    assert torch.equal(answers(module), before)


def test_ties_follow_the_memory_that_is_given() -> None:
    module = on_meta()
    given = {name: torch.rand(tensor.shape) for name, tensor in tensors_of(module).items() if "batches" not in name}
    given["norm.num_batches_tracked"] = torch.tensor(3)
    assign_tensors(module, given)
    assert module.output.weight is not module.embedding.weight
    assert torch.equal(module.output.weight, given["output.weight"])


def test_empty_memory_keeps_ties_types_and_shapes() -> None:
    module, model = on_meta(), trained()
    materialise_empty(module)
    assert module.output.weight is module.embedding.weight
    for name, tensor in tensors_of(module).items():
        wanted = tensors_of(model)[name]
        assert not tensor.is_meta
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), name


def test_a_tensor_that_is_no_buffer_gets_memory_too() -> None:
    module = on_meta()
    module.norm.table = torch.empty(3, device="meta")
    materialise_empty(module)
    assert tensors_of(module)["norm.table"] is module.norm.table
    assert not module.norm.table.is_meta


def test_a_view_that_nothing_shows_keeps_a_module_on_the_meta_device() -> None:
    module = on_meta()
    hidden = module.norm.weight.detach()[1:]
    with pytest.raises(InvalidArgument, match=r"norm\.weight"):
        materialise_empty(module)
    assert all(tensor.is_meta for tensor in [hidden, *tensors_of(module).values()])


def test_a_view_that_nothing_shows_sees_the_weights_of_a_module_with_memory(new_client: NewClient) -> None:
    source, module = trained(), trained(1)
    new_client().publish(KEY, tensors_of(source))
    hidden = module.norm.weight.detach()[1:]
    attach_module(module, KEY, new_client())
    assert torch.equal(answers(module), answers(source))
    assert torch.equal(hidden, source.norm.weight[1:])
