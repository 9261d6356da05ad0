"""The blobs of a key, by region and offset: addresses are known only in the process that has the regions mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast


class Part(NamedTuple):
    """Bytes of a region."""

    region: int
    """Index into the regions of the list."""
    offset: int
    size: int


class Blob(NamedTuple):
    """Bytes that the engine moves at once."""

    size: int
    parts: tuple[Part, ...]
    """A single part of the blob's size moves in place. Other parts go through a buffer of `size` bytes; its tail, if
    the parts are smaller, has no meaning."""

    @property
    def is_packed(self) -> bool:
        """Whether the blob goes through a buffer."""
        return len(self.parts) != 1 or self.parts[0].size != self.size


class BlobList(NamedTuple):
    """All blobs of a key on one side."""

    region_ids: tuple[str, ...]
    blobs: tuple[Blob, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of content, without the tails of packs."""
        return sum(part.size for blob in self.blobs for part in blob.parts)

    @classmethod
    def from_json(cls, value: object) -> BlobList:
        """A list from its JSON value. Raises ValueError."""
        try:
            region_ids, blobs = cast("tuple[list[object], list[tuple[object, Any]]]", value)  # a misfit raises below
            blob_list = cls(tuple(map(_text, region_ids)), tuple(_blob(size, parts) for size, parts in blobs))
        except TypeError as error:
            raise ValueError(f"not a list of blobs: {error}") from error
        if not blob_list.blobs:
            raise ValueError("a list of no blobs")
        return blob_list


def _blob(size: object, parts: Sequence[Sequence[object]]) -> Blob:
    blob = Blob(_number(size), tuple(Part(_number(region), _number(at), _number(of)) for region, at, of in parts))
    if not blob.parts or not 0 < sum(part.size for part in blob.parts) <= blob.size:
        raise ValueError(f"a blob of {blob.size} bytes has other parts: {blob.parts}")
    return blob


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not the id of a region")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a number of bytes")
    return value
