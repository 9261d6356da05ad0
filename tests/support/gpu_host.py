"""An emulated host with GPUs, with a real broker and instances on its GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from doubles.cuda.control import CudaHost
from support.broker_process import BrokerProcess
from support.card_process import CalledProcess


class GpuHost:
    """Starts what a test needs; ends it after the test."""

    def __init__(self, cuda: CudaHost, directory: Path) -> None:
        self.cuda = cuda
        self.directory = directory
        self._stack = ExitStack()

    def start_broker(self, *, enabled: str = "on", **environment: str) -> BrokerProcess:
        """A broker that serves the host's GPUs."""
        double = self.cuda.environment()
        broker = BrokerProcess(
            self.directory / "run",
            **{
                "CUDA_DOUBLE_STATE": double["CUDA_DOUBLE_STATE"],
                "WEIGHT_BROKER_CUDA_ENABLED": enabled,
                "WEIGHT_BROKER_CUDA_LIBRARY_PATH": double["LD_LIBRARY_PATH"],
                "WEIGHT_BROKER_CARDS_START_SECONDS": "20",
                **environment,
            },
        )
        self._stack.callback(broker.close)
        return broker.start()

    def start_instance(self, name: str, *, visible: str | None = None, prefix: Sequence[str] = ()) -> CalledProcess:
        """A process that calls functions of `support.gpu_instance` and `support.device_instance`."""
        process = CalledProcess(
            {
                **self.cuda.environment(visible),
                "WEIGHT_BROKER_RUNTIME_DIRECTORY": str(self.directory / "run"),
                "INSTANCE_NAME": name,
            },
            prefix=prefix,
        )
        self._stack.callback(process.close)
        return process

    def close(self) -> None:
        """Ends all of it."""
        self._stack.close()
