"""A process of a row that needs torch: `python -m weight_brokerd.proof.cuda.with_torch QUESTION` prints the answer."""

from __future__ import annotations

import json
import sys

from weight_broker.drivers import cuda
from weight_broker.memory import describe
from weight_broker.memory.cuda import kind
from weight_broker.memory.device.describe import DescribedDeviceTensors
from weight_broker.memory.device.digest import HostDigester, tensor_digests

_TENSORS = 400


def is_shareable() -> bool:
    """Whether a fresh tensor of this process has a handle."""
    import torch

    tensor = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
    return cuda.load().is_ipc_capable(tensor.data_ptr())


def digests_agree() -> bool:
    """Whether the GPU computes the digests that the processor computes."""
    import torch

    torch.manual_seed(7)
    tensors = {
        f"layer.{index}": torch.randint(0, 256, (index * 97 + 1,), dtype=torch.uint8, device="cuda")
        for index in range(_TENSORS)
    }
    described = describe(tensors)
    assert isinstance(described, DescribedDeviceTensors)
    driver = cuda.load()
    with driver.on_device(described.device_index):
        by_host = tensor_digests(described, HostDigester(driver.read), None).values
    return kind.KIND.digests(described).values == by_host


def main() -> None:
    """Answers one question."""
    try:
        import torch
    except ImportError:
        sys.exit("torch is not installed for this interpreter")
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU")
    answer = {"is_shareable": is_shareable, "digests_agree": digests_agree}[sys.argv[1]]()
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
