"""The options of the load format `weight_broker` in `--model-loader-extra-config`."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from weight_broker.errors import InvalidArgument

_FIELD = "model_loader_extra_config"
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "zero_copy": ("auto", True, False),
    "stage": ("auto", "loaded", "runtime"),
    "host_copy": ("auto", "always", "never"),
    "digest_mode": ("auto", "full", "sampled"),
    "checkpoint_digest": ("sampled", "full"),
    "engine_version": ("compatible", "minor", "exact"),
}
_SECONDS = ("timeout", "connect_timeout", "rank_timeout")


@dataclass(frozen=True, slots=True)
class Options:
    """Each field is an option."""

    runtime_directory: str = ""
    """Where the broker's sockets are; empty for the usual places."""
    name: str = ""
    """This instance's name in the broker's listings; empty for the model's name and the rank."""
    timeout: float = 300.0
    """Seconds for the whole acquisition, the wait for another instance's cold load included."""
    connect_timeout: float = 2.0
    """Seconds that an unresponsive broker may cost."""
    rank_timeout: float = 60.0
    """Seconds to wait for the engine's other ranks to ask, if there are several."""
    wait: bool = True
    """Whether to wait while another instance loads the same weights from disk."""
    publish: bool = True
    """Whether to become a source for others."""
    zero_copy: bool | str = "auto"
    """Whether the weights are copy-on-write views of the resident ones instead of copies; `auto`: wherever the engine
    lets them be, which is in host memory."""
    strict: bool = False
    """Whether a load that the broker neither served nor ordered from disk fails instead of falling back."""
    stage: str = "auto"
    """Which weights are shared: `loaded` (before post-processing), `runtime` (after it), `auto`: whichever is safe."""
    host_copy: str = "auto"
    """Whether weights in device memory are published as a copy in host memory, made before post-processing: `auto` for
    those that post-processing rewrites, quantized ones and experts."""
    digest_mode: str = "auto"
    """How much of the content is verified on arrival."""
    checkpoint_digest: str = "sampled"
    """How much of the checkpoint its digest covers: a sample, or the hub's SHA-256 of it; `full`: every byte."""
    engine_version: str = "compatible"
    """Which versions of the engine may share weights: versions that are known to lay them out alike, versions with
    the same minor version, or only the same version."""
    fallback_load_format: str = "auto"
    """The load format that reads from disk."""
    fallback_extra_config: Mapping[str, Any] = field(default_factory=dict)
    """Its `model_loader_extra_config`."""


def parse(config: object) -> Options:
    """The options in `model_loader_extra_config`. Raises `InvalidArgument` that names the option; for an unknown option
    it lists the known ones."""
    if isinstance(config, str):
        config = _from_json(config)
    if config is None:
        config = {}
    if not isinstance(config, Mapping):
        raise InvalidArgument(_FIELD, config, "an object of options")
    known = {option.name: option for option in fields(Options)}
    for name, value in config.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            raise InvalidArgument(
                f"{_FIELD}[{name!r}]", value, "one of the options " + ", ".join(sorted(known)),
                hint=f"Did you mean {close[0]}?" if close else "",
            )  # fmt: skip
        _check(name, value, str(known[name].type))
    values: dict[str, Any] = {name: float(value) if name in _SECONDS else value for name, value in config.items()}
    return Options(**values)


def _from_json(text: str) -> object:
    try:
        return json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(_FIELD, text, f"JSON ({error})") from None


def _check(name: str, value: object, kind: str) -> None:
    field_name = f"{_FIELD}[{name!r}]"
    if name in _CHOICES:
        if not any(value is choice or (value == choice and isinstance(value, str)) for choice in _CHOICES[name]):
            raise InvalidArgument(field_name, value, "one of " + ", ".join(map(repr, _CHOICES[name])))
    elif name in _SECONDS:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise InvalidArgument(field_name, value, "a positive number of seconds")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise InvalidArgument(field_name, value, "true or false")
    elif kind == "str":
        if not isinstance(value, str):
            raise InvalidArgument(field_name, value, "a text")
    elif not isinstance(value, Mapping):
        raise InvalidArgument(field_name, value, "an object")
