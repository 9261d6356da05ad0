"""The memory of NVIDIA's GPUs."""
