"""Makes the load format known to vLLM, in every process that loads its plugins."""

from __future__ import annotations

import logging
from typing import Any

LOAD_FORMAT = "weight_broker"

# A child of vLLM's own logger: its handlers and levels apply.
_logger = logging.getLogger("vllm.weight_broker")


def register() -> None:
    """The entry point. Idempotent; opens no connection, starts no thread. An unknown version of vLLM stays unchanged,
    with one line in the log."""
    try:
        from vllm.model_executor import model_loader
    except ImportError as error:
        _logger.warning("load format %s is not available: %s", LOAD_FORMAT, error)
        return
    if hasattr(model_loader, "register_model_loader"):
        _register(model_loader)
    elif hasattr(model_loader, "get_model_loader"):
        _register_without_registry()
    else:
        _logger.warning("load format %s is not available: this vLLM has no model loaders that it knows", LOAD_FORMAT)


def _register(model_loader: Any) -> None:
    from weight_broker.integrations.vllm.loader import BrokerModelLoader

    known = getattr(model_loader, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
    if known.get(LOAD_FORMAT) is not BrokerModelLoader:
        model_loader.register_model_loader(LOAD_FORMAT)(BrokerModelLoader)


def _register_without_registry() -> None:
    """vLLM 0.10.0 knows load formats as members of an enumeration, and accepts loader classes in their place: the
    name becomes a choice of the command line, and `LoadConfig` turns it into the class, which `get_model_loader` takes
    and workers can unpickle."""
    from vllm import config

    from weight_broker.integrations.vllm.loader import BrokerModelLoader

    formats: Any = config.LoadFormat
    name = LOAD_FORMAT.upper()
    if name in formats._member_map_:
        return
    member = str.__new__(formats, LOAD_FORMAT)
    member._name_, member._value_ = name, LOAD_FORMAT
    formats._member_map_[name] = member
    formats._member_names_.append(name)
    formats._value2member_map_[LOAD_FORMAT] = member
    load_config: Any = config.LoadConfig
    check = load_config.__post_init__

    def post_init(self: Any) -> None:
        check(self)
        if self.load_format == LOAD_FORMAT:
            self.load_format = BrokerModelLoader

    load_config.__post_init__ = post_init
