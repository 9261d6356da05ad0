"""What a weight file says about itself: tensors of a safetensors file, records of a file that torch.save wrote."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

_MAX_HEADER_BYTES = 100_000_000
_ZIP_NAME_LENGTHS = struct.Struct("<26xHH")
"""The local header of a record: lengths of its name and of the extra field, which the content follows."""
_ZIP_HEADER_BYTES = 30


class CheckpointError(ValueError):
    """The directory is not a checkpoint with a digest; the message names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    """Element type by its safetensors name, for example "BF16"; for a record of a zip file, its CRC-32."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of its first byte in the file."""
    size_bytes: int


def contents(file: Path) -> tuple[CheckpointTensor, ...]:
    """The tensors of a safetensors file, or the records of a file that torch.save wrote. Raises `CheckpointError`."""
    return checkpoint_tensors(file) if file.suffix == ".safetensors" else _records(file)


def checkpoint_tensors(file: Path) -> tuple[CheckpointTensor, ...]:
    """The tensors of one safetensors file, in the order of its bytes. Raises `CheckpointError`."""
    with file.open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise CheckpointError(f"{file} is not a safetensors file, or it is cut off ({file_bytes} bytes)")
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a header that is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object")
    start, tensors = 8 + header_bytes, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            tensor = CheckpointTensor(
                name, str(entry["dtype"]), tuple(map(int, entry["shape"])), file, start + begin, end - begin
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            raise CheckpointError(f"{file} has a damaged header entry for {name!r}") from None
        if begin < 0 or end < begin or start + end > file_bytes:
            raise CheckpointError(f"{file} ends before tensor {name!r} does; is the download complete?")
        tensors.append(tensor)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.begin, tensor.name)))


def _records(file: Path) -> tuple[CheckpointTensor, ...]:
    """The directory of the zip file has a CRC-32 over every byte of each record; the record `data.pkl` has the tensors'
    names, types and shapes."""
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            found = []
            for record in archive.infolist():
                stream.seek(record.header_offset)
                header = stream.read(_ZIP_HEADER_BYTES)
                begin = record.header_offset + _ZIP_HEADER_BYTES + sum(_ZIP_NAME_LENGTHS.unpack(header))
                # The first part is the name that the file had when it was written.
                name = f"{file.name}/{record.filename.partition('/')[2]}"
                crc = f"crc32 {record.CRC:08x}"
                found.append(CheckpointTensor(name, crc, (record.file_size,), file, begin, record.compress_size))
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise CheckpointError(
            f"{file} is not a zip file ({error}); files that torch.save wrote before version 1.6 have no digest"
        ) from None
    return tuple(found)


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises `CheckpointError`."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
