"""The contract of Ascend's driver: a row for each call, with its source and a body that shows whether it holds."""
