"""Whether the caller's tensors can be read, and written. Frameworks do not know of every tensor that cannot, and the
first touch of such a page is a signal that ends the process."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path

from weight_broker.layout import ITEM_SIZES
from weight_broker.memory.described import DescribedTensor, DescribedTensors, refusal
from weight_broker.memory.host import copying
from weight_broker.memory.host.address_space import populate_for_reading, populate_for_writing
from weight_broker.memory.host.immutable import BytesSearch

_MAPS = Path("/proc/self/maps")
_POPULATED_BYTES = 64 << 20
_EHWPOISON = 133
_UNREACHABLE = (errno.EFAULT, errno.ENOMEM, _EHWPOISON)

Mapping = tuple[int, int, bool]
"""First address, the address behind the last one, and whether a file has to supply the pages."""


def require_readable(described: DescribedTensors, deadline: float | None = None) -> None:
    """Raise `InvalidArgument` for a tensor in a mapping that is protected, or longer than its file. Where /proc is
    missing, nothing is looked at. Raises `DeadlinePassed`."""
    mappings = _mappings(0, b"r")
    if mappings:
        in_files = _require_mappings(_by_address(described), mappings, "a protected mapping", "memory that can be read")
        _require_pages(in_files, populate_for_reading, "memory that can be read", deadline)


def require_writable(described: DescribedTensors) -> None:
    """Raise `InvalidArgument` for a tensor in a read-only mapping, in one that its file or file system cannot supply
    with pages, or in an immutable object. Where /proc is missing, only what the framework knows counts."""
    described.require_writable()
    mappings = _mappings(1, b"w")
    if not mappings:
        return
    tensors, expected = _by_address(described), "memory that can be written"
    in_files = _require_mappings(tensors, mappings, "a read-only mapping", expected)
    _require_mutable(tensors, mappings)
    _require_pages(in_files, populate_for_writing, expected, None)


def _by_address(described: DescribedTensors) -> list[DescribedTensor]:
    return sorted((tensor for tensor in described.tensors if tensor.address), key=attrgetter("address"))


def _mappings(place: int, permission: bytes) -> list[Mapping]:
    """Those that have the permission, in the order of addresses; none if they cannot be read."""
    try:
        lines = _MAPS.read_bytes().splitlines()
    except OSError:
        return []
    found: list[Mapping] = []
    for line in lines:
        addresses, permissions, _, _, inode = line.split(None, 5)[:5]
        if permissions[place : place + 1] == permission:
            begin, end = addresses.split(b"-")
            found.append((int(begin, 16), int(end, 16), inode != b"0"))
    return found


def _require_mappings(
    tensors: Sequence[DescribedTensor], mappings: Sequence[Mapping], what: str, expected: str
) -> list[DescribedTensor]:
    """Returns the tensors that lie in mappings of files. Both come in the order of addresses."""
    in_files: list[DescribedTensor] = []
    first = 0
    for tensor in tensors:
        reached, end, is_in_file = tensor.address, tensor.address + tensor.spec.storage_bytes, False
        while first < len(mappings) and mappings[first][1] <= reached:
            first += 1
        index = first
        while reached < end and index < len(mappings) and mappings[index][0] <= reached:
            _, reached, is_of_file = mappings[index]
            is_in_file |= is_of_file
            index += 1
        if reached < end:
            raise refusal(tensor.spec.name, "memory", what, expected, "Use .clone() or .copy().")
        if is_in_file:
            in_files.append(tensor)
    return in_files


def _require_pages(
    tensors: Sequence[DescribedTensor], populate: Callable[[int, int], int], expected: str, deadline: float | None
) -> None:
    """A file may be shorter than its mapping, and a shared memory file system full."""
    refused: list[DescribedTensor] = []

    def touch(tensor: DescribedTensor, address: int, size: int) -> None:
        if populate(address, size) in _UNREACHABLE:
            refused.append(tensor)

    copying.run([partial(touch, *part) for part in _parts(tensors)], deadline=deadline)
    if refused:
        what = "a mapping beyond the end of its file, or of a full file system"
        raise refusal(refused[0].spec.name, "memory", what, expected, "Was the file replaced? Is /dev/shm full?")


def _parts(tensors: Sequence[DescribedTensor]) -> Iterator[tuple[DescribedTensor, int, int]]:
    for tensor in tensors:
        end = tensor.address + tensor.spec.storage_bytes
        for begin in range(tensor.address, end, _POPULATED_BYTES):
            yield tensor, begin, min(_POPULATED_BYTES, end - begin)


def _require_mutable(tensors: Sequence[DescribedTensor], mappings: Sequence[Mapping]) -> None:
    """PyTorch makes tensors of `bytes` and forgets that they must not change."""
    named: dict[int, str] = {}
    for tensor in tensors:
        if tensor.framework == "torch":
            spec = tensor.spec
            offset = spec.storage_offset * ITEM_SIZES[spec.dtype] if spec.storage_offset else 0
            named[tensor.address - offset] = spec.name
    search, index = BytesSearch(), 0
    for base in sorted(named):
        while index + 1 < len(mappings) and mappings[index][1] <= base:
            index += 1
        begin, end, is_of_file = mappings[index]
        if begin < base < end and not is_of_file and search.finds(base, begin, end):
            expected = "memory that can be written"
            raise refusal(named[base], "memory", "that of a bytes object", expected, "Use .clone().")
