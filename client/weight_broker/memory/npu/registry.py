"""What this process has exported, counted: a segment has one key at a time, however many publications lie in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from weight_broker.drivers.acl import EXPORT_TO_ANY_PROCESS, EXPORT_VALIDATES_PIDS, Acl, AclError


@dataclass(slots=True)
class Export:
    """An allocation or a chunk that is exported now."""

    device: int
    base: int
    """Address of the allocation; of a chunk, where it was mapped when it was exported."""
    size: int
    key: bytes | int
    """An allocation's export key or a chunk's shareable handle."""
    handle: int = 0
    """A chunk's handle, retained: the chunk cannot be freed, and its handle not be another's, while this is held."""
    holders: int = 0
    pids: list[int] = field(default_factory=list)
    """Bare TGIDs on its whitelist."""


class Exports:
    """The exports of a process. All calls have to be made on the memory's device (`Acl.on_device`)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._allocations: dict[tuple[int, int], Export] = {}
        self._chunks: dict[tuple[int, int], Export] = {}
        self._ended_chunks: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._allocations) + len(self._chunks)

    def export_allocation(
        self, acl: Acl, device: int, base: int, size: int, pids: Iterable[int], *, any_process: bool
    ) -> Export:
        """The export of a whole allocation; one more holder of it if there is one already."""
        with self._lock:
            export = self._allocations.get((device, base))
            if export is None:
                key = acl.ipc_export_key(base, size, _flags(any_process))
                export = self._allocations[device, base] = Export(device, base, size, key)
            elif export.size != size:
                words = f"{export.size} bytes at {base:#x} are exported, and now there are {size}"
                raise AclError("aclrtIpcMemGetExportKey", 0, f"{words}: the memory was freed before its publication")
            self._hold(acl, export, pids)
            return export

    def export_chunk(
        self, acl: Acl, device: int, address: int, size: int, pids: Iterable[int], *, any_process: bool
    ) -> Export:
        """The export of the chunk that is mapped at `address`; one more holder of it if there is one already."""
        with self._lock:
            handle = acl.retain_allocation_handle(address)
            export = self._chunks.get((device, handle))
            if export is not None:
                acl.free_physical(handle)  # it is retained already
            else:
                try:
                    shareable = self._shareable(acl, device, handle, any_process=any_process)
                except BaseException:
                    acl.free_physical(handle)
                    raise
                export = self._chunks[device, handle] = Export(device, address, size, shareable, handle)
            self._hold(acl, export, pids)
            return export

    def admit(self, acl: Acl, export: Export, pids: Iterable[int]) -> None:
        """Lets more processes import."""
        with self._lock:
            self._admit(acl, export, pids)

    def release(self, acl: Acl, export: Export) -> None:
        """One holder less; the last one ends the export. If the driver refuses, because somebody has still imported
        the memory, nothing has changed."""
        with self._lock:
            if export.holders == 1:
                self._end(acl, export)
            export.holders -= 1

    def _hold(self, acl: Acl, export: Export, pids: Iterable[int]) -> None:
        try:
            self._admit(acl, export, pids)
        except BaseException:
            if not export.holders:
                self._end(acl, export)
            raise
        export.holders += 1

    def _end(self, acl: Acl, export: Export) -> None:
        if isinstance(export.key, bytes):
            acl.ipc_close(export.key)
            del self._allocations[export.device, export.base]
            return
        acl.free_physical(export.handle)
        del self._chunks[export.device, export.handle]
        self._ended_chunks[export.device, export.handle] = export.key

    def _shareable(self, acl: Acl, device: int, handle: int, *, any_process: bool) -> int:
        """A chunk's shareable handle ends only with the chunk, and the driver gives no second one. A fresh chunk that
        has the same handle can be exported, so a refusal says that it is still the chunk of the earlier export."""
        earlier = self._ended_chunks.pop((device, handle), None)
        try:
            return acl.export_shareable_handle(handle, _flags(any_process))
        except AclError:
            if earlier is None:
                raise
            return earlier

    @staticmethod
    def _admit(acl: Acl, export: Export, pids: Iterable[int]) -> None:
        wanted = [*export.pids, *(pid for pid in dict.fromkeys(pids) if pid not in export.pids)]
        if len(wanted) == len(export.pids):
            return
        # All of them every time: right whether the driver adds to its list or replaces it.
        if isinstance(export.key, bytes):
            acl.ipc_set_import_pids(export.key, wanted)
        else:
            acl.set_pids_to_shareable_handle(export.key, wanted)
        export.pids = wanted


def _flags(any_process: bool) -> int:
    return EXPORT_TO_ANY_PROCESS if any_process else EXPORT_VALIDATES_PIDS


EXPORTS = Exports()
"""This process's."""
