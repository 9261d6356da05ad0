"""The client's compiled copy, which only an installation lacks that was made where there is no C compiler."""

from __future__ import annotations

import shutil

import pytest

from weight_broker.memory.host.streaming import StreamingCopy, streaming_copy


def skip_without_compiler() -> None:
    """Skips the test where nothing can be compiled."""
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")


def compiled_copy() -> StreamingCopy:
    """The compiled functions; skips the test where they cannot have been compiled."""
    found = streaming_copy()
    if found is None:
        skip_without_compiler()
    assert found is not None, "not compiled, although there is a compiler: install this package again"
    return found
