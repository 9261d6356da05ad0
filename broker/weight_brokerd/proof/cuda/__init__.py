"""The contract of NVIDIA's driver, as far as the product calls it."""
