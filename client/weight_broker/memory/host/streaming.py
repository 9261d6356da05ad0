"""The client's one piece of C: copying past the processor's caches, digesting on the way.

It is compiled while the package is built where there is a C compiler. Without it, or on a processor of another kind
than it was built for, `copying` does with memmove and xxhash's own functions, which takes up to twice as long
(benchmarks/ has the ratios). The source, client/native/streaming_copy.c, says why it is faster.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from weight_broker.digest import DigestAlgorithm, block_function, is_available

_INTERFACE = 1
# The number keeps Python from taking the file for an extension module.
_LIBRARY = Path(__file__).with_name("streaming_copy.so.1")
_PROBE = bytes(range(251)) * 200

_logger = logging.getLogger("weight_broker")


class DigestingCopy(Protocol):
    """Copies and returns the digest of each block, the last of which may be shorter."""

    def __call__(self, destination: int, source: int, size_bytes: int, block_bytes: int) -> list[int]:
        """Addresses, sizes. The ranges must not overlap."""


class StreamingCopy:
    """The compiled functions. None of them holds the interpreter lock."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.copy = library.weight_broker_copy
        """Called with the addresses of the destination and the source and a size; they must not overlap."""
        self.copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self.copy.restype = None
        self._copy_and_digest = library.weight_broker_copy_and_digest
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._copy_and_digest.argtypes = [pointer, pointer, size, size, pointer, pointer]
        self._xxh3 = _xxh3_functions()
        self.copy_and_digest: DigestingCopy | None = self._copy_with_xxh3
        """None without libxxhash's functions."""
        if self._xxh3 is None or not self._digests_right():
            self.copy_and_digest = None

    def _copy_with_xxh3(self, destination: int, source: int, size_bytes: int, block_bytes: int) -> list[int]:
        digests = (ctypes.c_uint64 * -(-size_bytes // block_bytes))()
        if self._copy_and_digest(destination, source, size_bytes, block_bytes, self._xxh3, digests):
            raise MemoryError("no memory for the state of a digest")
        return list(digests)

    def _digests_right(self) -> bool:
        """Whether the library's functions give the right digests."""
        size = len(_PROBE)
        source, copied = ctypes.create_string_buffer(_PROBE, size), ctypes.create_string_buffer(size)
        found = self._copy_with_xxh3(ctypes.addressof(copied), ctypes.addressof(source), size, size)
        return copied.raw == _PROBE and found == [block_function(DigestAlgorithm.XXH3_64)(_PROBE)]


@cache
def streaming_copy() -> StreamingCopy | None:
    """The compiled functions, if this installation has them."""
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        interface = library.weight_broker_copy_interface()
    except (OSError, AttributeError):
        return None
    if interface != _INTERFACE:
        _logger.warning("%s belongs to another version of this client; install the client again", _LIBRARY)
        return None
    return StreamingCopy(library)


def _xxh3_functions() -> ctypes.Array[ctypes.c_void_p] | None:
    """libxxhash's functions in the order of the C source's `struct xxh3`, out of the xxhash package's extension."""
    if not is_available(DigestAlgorithm.XXH3_64):
        return None
    try:
        specification = find_spec("xxhash._xxhash")
        library = ctypes.CDLL(specification.origin if specification is not None else "libxxhash.so.0")
        # The first one takes the instructions that this processor has; builds for other processors lack it.
        update = getattr(library, "XXH3_64bits_update_dispatch", None) or library.XXH3_64bits_update
        functions = [
            library.XXH3_createState,
            library.XXH3_freeState,
            library.XXH3_64bits_reset,
            update,
            library.XXH3_64bits_digest,
        ]
    except (OSError, AttributeError, ImportError):
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return (ctypes.c_void_p * len(addresses))(*addresses)
