"""What the plugin takes for granted of vLLM, asked of the vLLM that is installed, whichever version it is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from weight_broker.errors import InvalidArgument
from weight_broker.integrations.vllm import LOAD_FORMAT, register


@pytest.fixture(autouse=True)
def registered() -> None:
    """As vLLM does in each process, and in some twice."""
    register()
    register()


def load_config(**options: Any) -> Any:
    from vllm.config import LoadConfig

    return LoadConfig(load_format=LOAD_FORMAT, model_loader_extra_config=options)


def test_the_load_format_gets_the_loader() -> None:
    from vllm.model_executor.model_loader import get_model_loader

    from weight_broker.integrations.vllm.loader import BrokerModelLoader

    loader = get_model_loader(load_config(timeout=5))
    assert isinstance(loader, BrokerModelLoader)
    assert loader.options.timeout == 5.0


def test_the_command_line_takes_the_load_format() -> None:
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    options = parser.parse_args(["--load-format", LOAD_FORMAT, "--model-loader-extra-config", '{"wait": false}'])
    assert options.load_format == LOAD_FORMAT


def test_an_unknown_option_is_refused_when_the_loader_is_made() -> None:
    from vllm.model_executor.model_loader import get_model_loader

    with pytest.raises(InvalidArgument, match="Did you mean timeout"):
        get_model_loader(load_config(time_out=1))


def test_the_disk_is_read_by_a_loader_of_the_engines_own() -> None:
    from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    disk: Any = get_model_loader(load_config()).disk_loader
    assert isinstance(disk, DefaultModelLoader)
    assert type(disk).load_model is BaseModelLoader.load_model


def test_the_engine_loads_through_the_loader_and_then_post_processes() -> None:
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    source = inspect.getsource(BaseModelLoader.load_model)
    filled = source.index("self.load_weights(model, model_config)")
    assert filled < source.index("process_weights_after_loading(model, model_config, target_device)")


def test_the_engine_says_which_rank_this_is() -> None:
    from vllm.config import VllmConfig
    from vllm.distributed import parallel_state

    for name in ("get_tp_group", "get_pp_group", "get_dp_group", "get_ep_group", "get_node_count"):
        assert callable(getattr(parallel_state, name))
    assert "rank_in_group" in inspect.getsource(parallel_state.GroupCoordinator)
    assert "instance_id" in VllmConfig.__dataclass_fields__


def test_what_changes_weights_is_wrapped_once() -> None:
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.v1.worker.worker_base import WorkerBase

    from weight_broker.integrations.vllm import hooks

    class Worker(WorkerBase):  # type: ignore[misc]  # vLLM may not be installed
        def sleep(self, level: int = 1) -> str:
            return f"asleep {level}"

    class Model:
        def load_weights(self, weights: object) -> object:
            return weights

    hooks.install(Model())
    hooks.install(Model())
    for owner, name in ((Worker, "sleep"), (EplbState, "rearrange"), (Model, "load_weights")):
        wrapped = vars(owner)[name]
        assert hasattr(wrapped, "__wrapped__")
        assert not hasattr(wrapped.__wrapped__, "__wrapped__")
    assert Worker.sleep(object.__new__(Worker), 2) == "asleep 2"
    assert Model().load_weights("all") == "all"
