"""Modules of torch whose results depend on more than plain parameters and buffers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

WIDTH = 6


class Recurrent(nn.Module):
    """A recurrent layer, which keeps a second list of its parameters."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x[None])[0]
        return result


class Keeping(nn.Linear):
    """A linear layer that computes with another reference to its weight: `keep` returns how to get at that."""

    held: Any

    def __init__(self, keep: Callable[[Keeping], Callable[[], Any]]) -> None:
        super().__init__(WIDTH, WIDTH)
        self.kept = keep(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x @ self.kept().t() + self.bias
        return result


def in_list(layer: Keeping) -> Callable[[], Any]:
    layer.held = [layer.weight]
    return lambda: layer.held[0]


def in_tuple(layer: Keeping) -> Callable[[], Any]:
    held = (layer.weight,)
    return lambda: held[0]


def in_dict(layer: Keeping) -> Callable[[], Any]:
    layer.held = {"w": {"x": layer.weight}}
    return lambda: layer.held["w"]["x"]


def in_closure(layer: Keeping) -> Callable[[], Any]:
    weight = layer.weight
    return lambda: weight


def in_partial(layer: Keeping) -> Callable[[], Any]:
    return functools.partial(lambda weight: weight, layer.weight)


def in_weak_reference(layer: Keeping) -> Callable[[], Any]:
    return weakref.ref(layer.weight)


def in_object(layer: Keeping) -> Callable[[], Any]:
    class Other:
        __slots__ = ("weight",)

    other = Other()
    other.weight = layer.weight  # type: ignore[attr-defined]
    return lambda: other.weight  # type: ignore[attr-defined]


def in_view(layer: Keeping) -> Callable[[], Any]:
    layer.held = layer.weight.t()
    return lambda: layer.held.mT


def in_detached_view(layer: Keeping) -> Callable[[], Any]:
    layer.held = [layer.weight.detach().view(-1)]
    return lambda: layer.held[0].view(WIDTH, WIDTH)


class Beside(nn.Linear):
    """A linear layer with a tensor that is a plain attribute, in a container."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.tables: Any = {"scales": [torch.rand(WIDTH)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x) * self.tables["scales"][0]
        return result


class WithArray(nn.Linear):
    """A linear layer with an array of NumPy."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.scale = np.random.default_rng(int(torch.randint(1 << 30, (), device="cpu"))).random(WIDTH, np.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * torch.from_numpy(self.scale)


class Slotted(nn.Linear):
    """A linear layer with a tensor in a slot."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        object.__setattr__(self, "scale", torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = super().forward(x) * object.__getattribute__(self, "scale")
        return result


class Unregistered(nn.Module):
    """A module with layers in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.others = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH).eval()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.first(x)
        for other in self.others:
            result = other(result)
        return result


class TiedAcross(nn.Module):
    """Two modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x))
        return result


class Lists(nn.Module):
    """Parameters in torch's own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ParameterList([nn.Parameter(torch.rand(WIDTH)) for _ in range(2)])
        self.named = nn.ParameterDict({"w": nn.Parameter(torch.rand(WIDTH, WIDTH))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (x * self.steps[0] + self.steps[1]) @ self.named["w"]
        return result


class Attention(nn.Module):
    """Attention, with a buffer that is not persistent."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.register_buffer("scale", torch.rand(WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attention(x[None], x[None], x[None])[0] * self.scale
        return result


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def parametrized() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def weight_normed() -> nn.Module:
    layer: nn.Module = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    return layer


def spectral_normed() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def normed_by_hook() -> nn.Module:
    layer: nn.Module = torch.nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH))
    return layer


SOUND: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    **{
        keep.__name__: functools.partial(Keeping, keep)
        for keep in (
            in_list, in_tuple, in_dict, in_closure, in_partial, in_weak_reference, in_object, in_view, in_detached_view
        )
    },
    "attribute": Beside,
    "slot": Slotted,
    "unregistered layers": Unregistered,
    "tied": TiedAcross,
    "containers": Lists,
    "attention": Attention,
    "parametrized": parametrized,
    "weight_norm": weight_normed,
    "spectral_norm": spectral_normed,
}  # fmt: skip
"""Modules that every way fills."""


def quantized() -> nn.Module:
    """Its weights are in packed parameters alone."""
    layers = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)).eval()
    quantize: Any = torch.ao.quantization.quantize_dynamic
    module: nn.Module = quantize(layers, {nn.Linear}, dtype=torch.qint8)
    return module


class ExtraState(nn.Linear):
    """A layer whose state dict has a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.factor = [float(torch.rand((), device="cpu"))]

    def get_extra_state(self) -> Any:
        return {"factor": self.factor[0]}

    def set_extra_state(self, state: Any) -> None:
        self.factor[0] = state["factor"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.factor[0]


class Calibrated(nn.Linear):
    """A layer that computes a number when a state dict is loaded."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.largest = 1.0
        register: Any = self.register_load_state_dict_post_hook
        register(lambda module, keys: module.calibrate())

    def calibrate(self) -> None:
        self.largest = float(self.weight.detach().abs().max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.largest


class QuantizationState:
    """What bitsandbytes hangs on a parameter."""

    def __init__(self) -> None:
        self.absmax = torch.rand(WIDTH)
        self.blocksize = 64
        self.offset = float(torch.rand((), device="cpu"))


class QuantizedParameter(nn.Parameter):
    """A parameter with quantization state."""

    quant_state: QuantizationState

    @staticmethod
    def __new__(cls: type[QuantizedParameter], data: torch.Tensor) -> QuantizedParameter:
        parameter = torch.Tensor._make_subclass(cls, data, False)
        parameter.quant_state = QuantizationState()
        return parameter


class WithQuantizedParameter(nn.Module):
    """A layer with such a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = QuantizedParameter(torch.rand(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.weight.quant_state
        weight = self.weight.detach().as_subclass(torch.Tensor)
        return x @ (weight * state.absmax) + state.offset


class Scaled(torch.Tensor):
    """A tensor that wraps two others, as those of torchao do."""

    numbers: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls: type[Scaled], numbers: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype)

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> Scaled:
        return Scaled(parts["numbers"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return Scaled(args[0].numbers, args[0].scale)
        unwrap = [a.numbers * a.scale if isinstance(a, Scaled) else a for a in args]
        return function(*unwrap, **(kwargs or {}))


class WithWrapper(nn.Module):
    """A layer whose weight wraps two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(Scaled(torch.rand(WIDTH, WIDTH), torch.rand(WIDTH)), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight)


class Scripted(nn.Module):
    """What TorchScript compiles: a tensor is an attribute there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scale = torch.rand(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x) * self.scale
        return result


def compiled() -> nn.Module:
    module: Any = torch.compile(nn.Linear(WIDTH, WIDTH), backend="eager")
    return module  # type: ignore[no-any-return]


def scripted() -> nn.Module:
    module: Any = torch.jit.script(Scripted())
    return module  # type: ignore[no-any-return]


FILLED: dict[str, Callable[[], nn.Module]] = {
    "array": WithArray,
    "weight_norm by a hook": normed_by_hook,
    "wrapper": WithWrapper,
    "compiled": compiled,
    "scripted": scripted,
}
"""Modules that have to have memory, which is filled."""

STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "quantized": quantized,
    "extra state": ExtraState,
    "quantization state": WithQuantizedParameter,
}
"""Modules with state that is in no tensor and differs in every instance."""
