"""A module filled through the broker computes what its source computes, whatever it keeps beside its parameters; or it
is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from support.broker_process import BrokerProcess
from support.odd_modules import FILLED, SOUND, STATEFUL, WIDTH, Calibrated, WithWrapper, scripted
from weight_broker import BrokerClient, InvalidArgument, LayoutMismatch, WeightSetKey
from weight_broker.integrations.torch import attach_module, load_module, materialise_empty, tensors_of

KEY = WeightSetKey("odd", dtype="float32")
NewClient = Callable[[], BrokerClient]
Make = Callable[[], nn.Module]


@pytest.fixture
def new_client(broker: BrokerProcess) -> Iterator[NewClient]:
    """Makes clients; to the broker each is another instance."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(BrokerClient(broker.runtime_directory))


def made(make: Make, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def on_meta(make: Make) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def fail() -> None:
    pytest.fail("the disk was read")


def answers(module: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    result: torch.Tensor = module(torch.randn(4, WIDTH))
    return result.detach()


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND.keys())
def test_a_module_computes_what_its_source_computes(make: Make, new_client: NewClient) -> None:
    source = made(make, 1)
    new_client().publish(KEY, tensors_of(source))
    client = new_client()

    module = made(make, 2)
    assert not torch.equal(answers(module), answers(source)), "the test would show nothing"
    client.acquire(KEY, tensors_of(module))
    assert torch.equal(answers(module), answers(source)), "acquire"

    module = made(make, 2)
    load_module(module, KEY, fail, client)
    assert torch.equal(answers(module), answers(source)), "load_module"

    module = made(make, 2)
    attach_module(module, KEY, client)
    assert torch.equal(answers(module), answers(source)), "attach_module"


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND.keys())
def test_a_module_on_the_meta_device_computes_what_its_source_computes(make: Make, new_client: NewClient) -> None:
    source = made(make, 1)
    new_client().publish(KEY, tensors_of(source))
    client = new_client()

    module = on_meta(make)
    attach_module(module, KEY, client)
    assert torch.equal(answers(module), answers(source)), "attach_module"

    module = on_meta(make)
    materialise_empty(module)
    client.acquire(KEY, tensors_of(module))
    assert torch.equal(answers(module), answers(source)), "acquire"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", FILLED.values(), ids=FILLED.keys())
def test_a_module_whose_memory_is_special_is_filled_too(make: Make, new_client: NewClient) -> None:
    source, module = made(make, 1), made(make, 2)
    new_client().publish(KEY, tensors_of(source))
    assert not torch.equal(answers(module), answers(source)), "the test would show nothing"
    assert load_module(module, KEY, fail, new_client()).source == "peer"
    assert torch.equal(answers(module), answers(source))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_a_module_with_other_state_in_no_tensor_is_refused_by_name(make: Make, new_client: NewClient) -> None:
    source, module = made(make, 1), made(make, 2)
    new_client().publish(KEY, tensors_of(source))
    before = answers(module)
    for take in (attach_module, lambda module, key, client: client.acquire(key, tensors_of(module))):
        with pytest.raises(LayoutMismatch, match="in no tensor"):
            take(module, KEY, new_client())
        assert torch.equal(answers(module), before)
    loads = []
    report = load_module(module, KEY, lambda: loads.append(1), new_client())
    assert (report.source, loads) == ("disk", [1])
    assert "in no tensor" in (report.acquire_error or "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL.keys())
def test_a_module_with_the_same_state_in_no_tensor_is_filled(make: Make, new_client: NewClient) -> None:
    source, module = made(make, 1), made(make, 1)
    with torch.no_grad():
        next(source.parameters()).add_(1)
    new_client().publish(KEY, tensors_of(source))
    assert load_module(module, KEY, fail, new_client()).source == "peer"
    assert torch.equal(answers(module), answers(source))


def test_numbers_that_a_load_hook_computes_are_part_of_the_module(new_client: NewClient) -> None:
    source, checkpoint = made(Calibrated, 1), made(Calibrated, 2).state_dict()
    report = load_module(source, KEY, lambda: void(source.load_state_dict(checkpoint)), new_client())
    assert "largest: 1.0 -> " in (report.publish_error or ""), "a receiver runs no hook"
    new_client().publish(KEY, tensors_of(source))
    module = made(Calibrated, 3)
    with pytest.raises(LayoutMismatch, match="numbers"):
        attach_module(module, KEY, new_client())
    report = load_module(module, KEY, lambda: void(module.load_state_dict(checkpoint)), new_client())
    assert (report.source, "numbers" in (report.acquire_error or "")) == ("disk", True)
    assert torch.equal(answers(module), answers(source))


def test_numbers_that_the_load_computes_keep_the_weights_from_being_published(new_client: NewClient) -> None:
    module = made(lambda: nn.Linear(WIDTH, WIDTH), 1)

    def load() -> None:
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        vars(module)["scale"] = 7.5

    report = load_module(module, KEY, load, new_client())
    assert "scale: absent -> 7.5" in (report.publish_error or "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [WithWrapper, scripted], ids=["wrapper", "scripted"])
def test_memory_that_cannot_be_exchanged_is_refused_by_name_and_nothing_is_changed(
    make: Make, new_client: NewClient
) -> None:
    source = made(make, 1)
    new_client().publish(KEY, tensors_of(source))
    module = on_meta(make)
    with pytest.raises(InvalidArgument, match=r"module\.\w*\.?weight"):
        attach_module(module, KEY, new_client())
    assert all(tensor.is_meta for tensor in tensors_of(module).values() if tensor.numel())


def void(value: object) -> None:
    """For lambdas that have to return nothing."""
