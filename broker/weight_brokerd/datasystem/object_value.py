"""A value on its way into or out of the datasystem: memory behind a descriptor."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType

_WHOLE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class ObjectValue:
    """A descriptor of memory, and how many of its bytes are the value. Owns the descriptor until closed."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.descriptor = descriptor
        self.size_bytes = size_bytes

    @classmethod
    def of(cls, content: bytes | bytearray | memoryview) -> ObjectValue:
        """A sealed memfd with the content. Raises OSError if there is no memory for it."""
        descriptor = os.memfd_create("weight-broker-object", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            left = memoryview(content).cast("B")
            size = left.nbytes
            while left:
                left = left[os.write(descriptor, left) :]
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _WHOLE)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, size)

    def read(self) -> bytes:
        """A copy of the value."""
        parts, at = [], 0
        while at < self.size_bytes:
            part = os.pread(self.descriptor, self.size_bytes - at, at)
            if not part:
                raise OSError(f"the memory of a value ends after {at} of {self.size_bytes} bytes")
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Gives the memory up. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> ObjectValue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
