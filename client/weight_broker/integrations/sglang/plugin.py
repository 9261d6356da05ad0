"""Makes the load format known to SGLang, in every process that loads its plugins."""

from __future__ import annotations

import functools
import logging
from typing import Any

from weight_broker.integrations.engine.changes import MARK

LOAD_FORMAT = "weight_broker"

_logger = logging.getLogger("sglang.weight_broker")


def register() -> None:
    """The entry point. Idempotent; opens no connection, starts no thread. An unknown version of SGLang stays unchanged,
    with one line in the log.

    A load format is a choice of the command line, and may be a loader's class wherever SGLang chooses a loader:
    `LoadConfig` turns the one into the other.
    """
    try:
        from sglang.srt import server_args
        from sglang.srt.configs.load_config import LoadConfig
    except ImportError as error:
        _logger.warning("load format %s is not available: %s", LOAD_FORMAT, error)
        return
    add, choices = (getattr(server_args, name, None) for name in ("add_load_format_choices", "LOAD_FORMAT_CHOICES"))
    if add is None or choices is None or not hasattr(LoadConfig, "__post_init__"):
        _logger.warning("load format %s is not available: this SGLang takes none from elsewhere", LOAD_FORMAT)
        return
    if LOAD_FORMAT not in choices:
        add([LOAD_FORMAT])
    _resolve(LoadConfig)


def _resolve(load_config: Any) -> None:
    check = load_config.__post_init__
    if hasattr(check, MARK):
        return

    @functools.wraps(check)
    def post_init(self: Any) -> None:
        if isinstance(self.load_format, str) and self.load_format.lower() == LOAD_FORMAT:
            from weight_broker.integrations.sglang.loader import BrokerModelLoader

            self.load_format = BrokerModelLoader
        check(self)

    setattr(post_init, MARK, True)
    load_config.__post_init__ = post_init
