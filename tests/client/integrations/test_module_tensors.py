"""What is found in a module, under which names, and what happens to it when its memory is exchanged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from support.odd_modules import FILLED, SOUND, STATEFUL
from weight_broker.errors import InvalidArgument
from weight_broker.integrations.modules.tensors import ModuleTensors
from weight_broker.integrations.torch import assign_tensors, copy_tensors, tensors_of
from weight_broker.memory.tensors import describe


def moved(module: nn.Module) -> list[str]:
    """Names of what moves."""
    tensors = tensors_of(module)
    return [name for name in tensors if name not in tensors.compared]


def compared(module: nn.Module) -> list[str]:
    """Names of what is compared, without the digests."""
    return [name.partition(" (")[0] for name in tensors_of(module).compared]


def copies(tensors: ModuleTensors) -> dict[str, object]:
    return {name: torch.full_like(tensor, 9).detach() for name, tensor in tensors.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [*SOUND.values(), *FILLED.values(), *STATEFUL.values()])
def test_two_instances_of_a_class_have_the_same_names(make: Any) -> None:
    assert moved(make()) == moved(make())
    assert compared(make()) == compared(make())


def test_a_usual_module_has_nothing_but_parameters_and_buffers() -> None:
    module = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2), nn.MultiheadAttention(2, 1), nn.LSTM(2, 2))
    assert set(tensors_of(module)) == set(module.state_dict())


class Cluttered(nn.Linear):
    """Holds what modules hold besides weights: none of it is a weight."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock, self.log, self.generator = threading.Lock(), logging.getLogger("x"), torch.Generator()
        self.back: Any = [self, lambda: self]
        self.optimizer = torch.optim.Adam(self.parameters())
        self(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()


def test_what_a_module_holds_besides_weights_is_left_alone() -> None:
    assert list(tensors_of(Cluttered())) == ["weight", "bias"]


class OnDisk(Mapping[str, torch.Tensor]):
    """Tensors that are read when they are asked for."""

    def __getitem__(self, name: str) -> torch.Tensor:
        pytest.fail("the disk was read")

    def __iter__(self) -> Iterator[str]:
        return iter(["w"])

    def __len__(self) -> int:
        return 1


def test_a_mapping_that_reads_when_it_is_asked_is_not_asked() -> None:
    module = nn.Linear(2, 2)
    vars(module)["source"] = OnDisk()
    assert list(tensors_of(module)) == ["weight", "bias"]


class Private:
    """An object with a private slot."""

    __slots__ = ("__scale",)

    def __init__(self) -> None:
        self.__scale = torch.rand(2)


def test_private_slots_and_keys_that_are_objects_have_names_that_every_process_finds() -> None:
    module = nn.Linear(2, 2)
    vars(module).update(other=Private(), table={module.weight: torch.rand(3), "x": torch.rand(4)})
    assert moved(module)[2:] == ["other._Private__scale", "table.0", "table.x"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.ones(1).expand(4),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    ],
    ids=["sparse", "lazy conjugate", "overlapping", "quantized"],
)
def test_tensors_that_cannot_be_filled_in_place_are_compared(make: Callable[[], torch.Tensor]) -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    vars(module)["table"], vars(other)["table"] = make(), make()
    assert compared(module) == ["table"]
    assert tensors_of(module).compared == tensors_of(other).compared
    describe(tensors_of(module))


class Flat(nn.Module):
    """Parameters that are parts of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = torch.rand(8)
        self.first, self.last = nn.Parameter(self.flat[:4]), nn.Parameter(self.flat[4:7])


def test_a_tensor_with_more_than_its_parts_moves_as_a_whole_too() -> None:
    source, module = Flat(), Flat()
    copy_tensors(tensors_of(module), tensors_of(source))
    assert torch.equal(module.flat, source.flat)
    assert torch.equal(module.last, source.last)


class Frozen(nn.Linear):
    """A module that does not let its parameters be assigned once it is frozen."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "bias" and vars(self).get("is_frozen"):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


def test_an_error_on_the_way_undoes_everything() -> None:
    module = Frozen(2, 2)
    module.held = module.weight.t()
    vars(module)["is_frozen"] = True
    before = {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
    places = [module.weight.data_ptr(), module.bias.data_ptr(), module.held.data_ptr()]
    with pytest.raises(InvalidArgument, match="frozen"):
        assign_tensors(module, copies(tensors_of(module)))
    assert [module.weight.data_ptr(), module.bias.data_ptr(), module.held.data_ptr()] == places
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(module).items())


class Watching(nn.Linear):
    """A module that keeps a list of what is assigned."""

    assigned: Any

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        vars(self).setdefault("assigned", []).append(name)


def test_parameters_are_assigned_where_the_module_sees_it() -> None:
    module = Watching(2, 2)
    module.assigned.clear()
    assign_tensors(module, copies(tensors_of(module)))
    assert module.assigned == ["weight", "bias"]


def test_a_module_is_assigned_to_after_a_backward_pass_too() -> None:
    module = nn.Linear(2, 2)
    kept = module(torch.ones(1, 2))
    assign_tensors(module, copies(tensors_of(module)))
    assert (module.weight == 9).all()
    kept.sum().backward()


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_local_part_of_a_distributed_tensor_moves(mesh: Any) -> None:
    def make() -> nn.Linear:
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
        return module

    source, module = make(), make()
    copy_tensors(tensors_of(module), tensors_of(source))
    assert isinstance(module.weight, DTensor)
    assert torch.equal(module.weight.to_local(), tensors_of(source)["weight._local_tensor"])
    with pytest.raises(InvalidArgument, match=r"module\.weight"):
        assign_tensors(module, tensors_of(source))
