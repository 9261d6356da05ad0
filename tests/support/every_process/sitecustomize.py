"""What a test wants to be different in every process of an engine: on the path, Python imports this when it starts."""

import os

if "TEST_PLAIN_PROCESSOR" in os.environ:
    import torch

    # vLLM chooses kernels, and with them whether it packs weights, by what the processor can do. So that the tests say
    # the same everywhere, it can do no more than AVX2. ONEDNN_MAX_CPU_ISA says so to its libraries.
    for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        setattr(torch.cpu, name, lambda: False)
exec(os.environ.get("TEST_EVERY_PROCESS", ""))
