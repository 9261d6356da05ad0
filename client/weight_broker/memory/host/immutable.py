"""Finds the `bytes` object that an address lies in. A buffer does not say whose memory it is, but CPython keeps a
header in front of it."""

from __future__ import annotations

import sys

from weight_broker.memory.host.address_space import buffer_at

_HEADER_BYTES = 32
"""Count of references, type, size and hash."""
_TYPE_OF_BYTES = id(bytes).to_bytes(8, sys.byteorder)
_IS_KNOWN = bytes.__basicsize__ == _HEADER_BYTES + 1
"""Other Pythons have other headers."""
_ALLOCATED_BY_PYTORCH = 64
"""PyTorch's own memory is aligned to so many bytes, that of a large `bytes` object seldom is."""
_NEAR_BYTES, _FAR_BYTES = 256, 1 << 20


class BytesSearch:
    """For addresses that grow."""

    def __init__(self) -> None:
        self._searched = 0
        """No object that begins before this address reaches the next one."""

    def finds(self, address: int, begin: int, end: int) -> bool:
        """Whether the address lies in a living `bytes` object. `begin` and `end` bound the mapping around it, which can
        be read. An object that begins more than 1 MiB before the address is not found."""
        distance = _FAR_BYTES if address % _ALLOCATED_BY_PYTORCH else _NEAR_BYTES
        begin = max(begin, address - distance, self._searched)
        self._searched = max(address - _HEADER_BYTES, self._searched)
        before = bytes(buffer_at(begin, address - begin)) if _IS_KNOWN and address > begin else b""
        found = before.rfind(_TYPE_OF_BYTES)
        while found >= 8:
            if (begin + found) % 16 == 8 and _covers(before, found - 8, len(before), end - begin):
                return True
            found = before.rfind(_TYPE_OF_BYTES, 0, found)
        return False


def _covers(before: bytes, header: int, wanted: int, end: int) -> bool:
    """Whether the object with this header lives and reaches from its content beyond `wanted`; offsets in `before`."""
    references = int.from_bytes(before[header : header + 8], sys.byteorder)
    length = int.from_bytes(before[header + 16 : header + 24], sys.byteorder)
    content = header + _HEADER_BYTES
    return references > 0 and content <= wanted < content + length <= end
