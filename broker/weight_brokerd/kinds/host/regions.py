"""Host memory regions: sealed memfds that instances handed over, and who needs them.

A region stays open while its instance offers it or a holder (a publication or a transfer) refers to it. The broker
never maps a region: it keeps the descriptor and passes it on to receivers.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weight_broker.errors import BrokerError, InvalidArgument, PublishRefused, Reason, from_reason
from weight_brokerd.core.conduct.quota import Quota, take_all
from weight_brokerd.core.model import Process

MAXIMUM_REGION_ID_LENGTH = 64
_UNKNOWN_BYTES = 1 << 50
REQUIRED_SEALS = {
    "F_SEAL_SEAL": fcntl.F_SEAL_SEAL,
    "F_SEAL_SHRINK": fcntl.F_SEAL_SHRINK,
    "F_SEAL_GROW": fcntl.F_SEAL_GROW,
    "F_SEAL_WRITE": fcntl.F_SEAL_WRITE,
}


@dataclass(frozen=True, slots=True)
class _Memory:
    """The memfd behind a descriptor."""

    device: int
    inode: int
    size_bytes: int

    @classmethod
    def of(cls, descriptor: int) -> _Memory:
        found = os.fstat(descriptor)
        return cls(found.st_dev, found.st_ino, found.st_size)


@dataclass(slots=True)
class _Region:
    instance_id: str
    process: Process
    region_id: str
    descriptor: int
    size_bytes: int
    memory: _Memory
    offered: bool = True
    holders: set[str] = field(default_factory=set)


class RegionTable:
    """All host memory regions of this broker. `(instance_id, region_id)` names a region while it is open."""

    def __init__(
        self, *, regions_per_instance: int, maximum_bytes: int | None = None, quotas: Sequence[Quota] = ()
    ) -> None:
        """`maximum_bytes` of one region; None: as much as this host has. `quotas` bound what the regions take of the
        broker, for each process and user."""
        self._maximum_bytes = host_bytes() if maximum_bytes is None else maximum_bytes
        self._quotas = quotas
        self._regions_per_instance = regions_per_instance
        self._regions: dict[str, dict[str, _Region]] = {}
        self._held: dict[str, tuple[_Region, ...]] = {}
        self._memories: Counter[_Memory] = Counter()
        self._count = 0
        self._bytes = 0

    @property
    def region_count(self) -> int:
        """Open regions."""
        return self._count

    @property
    def region_bytes(self) -> int:
        """Bytes of the memory behind all open regions. Memory that instances share counts once: a receiver that
        publishes the weights that it mapped offers the same memfd again."""
        return self._bytes

    def offer(
        self, instance_id: str, region_id: str, size_bytes: int, descriptor: int, process: Process | None = None
    ) -> None:
        """Takes a region over; `descriptor` belongs to the table from here on, also if it raises. `process`: whom it is
        counted for, the instance alone if None.

        Offering the same memory again under the same id changes nothing. Raises `InvalidArgument` for a wrong field or
        an id in use, `PublishRefused` (REGION_REFUSED, LIMIT_EXCEEDED) for memory that cannot be shared or is too much.
        """
        process = process or Process(-1, instance_id)
        try:
            known = self._offered_before(instance_id, region_id, size_bytes, descriptor)
            if not known:
                take_all(self._quotas, process)
        except BaseException:
            _close(descriptor)
            raise
        if known:
            _close(descriptor)
            return
        memory = _Memory.of(descriptor)
        region = _Region(instance_id, process, region_id, descriptor, size_bytes, memory)
        self._regions.setdefault(instance_id, {})[region_id] = region
        self._count += 1
        self._memories[memory] += 1
        if self._memories[memory] == 1:
            self._bytes += memory.size_bytes

    def hold(self, holder: str, instance_id: str, region_ids: Iterable[str]) -> None:
        """Keeps regions of an instance open until `release(holder)`; all of them, or none if it raises.

        `holder` is the id of a publication or of a transfer, and holds once. Raises `PublishRefused` (REGION_REFUSED)
        if the instance has no such region.
        """
        regions = tuple(self._region(instance_id, region_id) for region_id in region_ids)
        for region in regions:
            region.holders.add(holder)
        self._held[holder] = regions

    def release(self, holder: str) -> None:
        """Ends all holds of `holder`; closes regions without an offer or a holder. Idempotent."""
        for region in self._held.pop(holder, ()):
            if holder in region.holders:  # False the second time if the holder names a region twice
                region.holders.remove(holder)
                self._close_unless_needed(region)

    def descriptor(self, holder: str, index: int) -> int:
        """Descriptor of the region at `index` among those of `holder`. The table owns it: do not close it."""
        regions = self._held.get(holder, ())
        if not 0 <= index < len(regions):
            raise InvalidArgument("claim_region.region_index", index, f"less than {len(regions)}, the source's regions")
        return regions[index].descriptor

    def withdraw(self, instance_id: str, region_id: str) -> None:
        """Ends the instance's offer; raises `PublishRefused` (REGION_REFUSED) if it has no such region."""
        region = self._region(instance_id, region_id)
        region.offered = False
        self._close_unless_needed(region)

    def drop_instance(self, instance_id: str) -> None:
        """Ends all offers of an instance. Held regions stay open until their holders release them. Idempotent."""
        for region in list(self._regions.get(instance_id, {}).values()):
            region.offered = False
            self._close_unless_needed(region)

    def size_bytes(self, instance_id: str, region_id: str) -> int:
        """The region's declared size; raises `PublishRefused` (REGION_REFUSED) if the instance has no such region."""
        return self._region(instance_id, region_id).size_bytes

    def close(self) -> None:
        """Closes every region, held or not."""
        for regions in self._regions.values():
            for region in regions.values():
                os.close(region.descriptor)
        self._regions.clear()
        self._held.clear()
        self._memories.clear()
        self._count = self._bytes = 0

    def _offered_before(self, instance_id: str, region_id: str, size_bytes: int, descriptor: int) -> bool:
        """True if the same offer was made before; raises if the offer is refused."""
        if not 1 <= len(region_id) <= MAXIMUM_REGION_ID_LENGTH:
            raise InvalidArgument("offer_region.region_id", region_id, f"1 to {MAXIMUM_REGION_ID_LENGTH} characters")
        _check_memory(descriptor, size_bytes, self._maximum_bytes)
        known = self._regions.get(instance_id, {})
        region = known.get(region_id)
        if region is not None:
            same = region.memory == _Memory.of(descriptor) and region.size_bytes == size_bytes
            if region.offered and same:
                return True
            raise InvalidArgument("offer_region.region_id", region_id, "an id that no region of this instance has now")
        if len(known) >= self._regions_per_instance:
            raise from_reason(
                Reason.LIMIT_EXCEEDED,
                f"the instance has {len(known)} regions, as many as limits.regions_per_instance allows. Withdraw what "
                "is not needed, put more tensors into one region or raise the limit",
                metadata={"limit": "limits.regions_per_instance", "value": str(self._regions_per_instance)},
            )
        return False

    def _region(self, instance_id: str, region_id: str) -> _Region:
        region = self._regions.get(instance_id, {}).get(region_id)
        if region is None:
            shown = region_id[:MAXIMUM_REGION_ID_LENGTH]
            raise from_reason(
                Reason.REGION_REFUSED,
                f"the instance has no region {shown!r}. Offer it on the attach socket first",
                metadata={"region_id": shown},
            )
        return region

    def _close_unless_needed(self, region: _Region) -> None:
        if region.offered or region.holders:
            return
        regions = self._regions[region.instance_id]
        del regions[region.region_id]
        if not regions:
            del self._regions[region.instance_id]
        os.close(region.descriptor)
        for quota in self._quotas:
            quota.give_back(region.process)
        self._count -= 1
        self._memories[region.memory] -= 1
        if not self._memories[region.memory]:
            del self._memories[region.memory]
            self._bytes -= region.memory.size_bytes


def host_bytes() -> int:
    """The host's memory and swap: no filled memfd is larger, but a sparse one may be."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(rows[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        return _UNKNOWN_BYTES


def _check_memory(descriptor: int, size_bytes: int, maximum_bytes: int) -> None:
    """Raises unless the descriptor is a memfd whose content and size can never change and that is large enough."""
    try:
        found = os.fstat(descriptor)
        target = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError as error:
        raise _refused(f"it cannot be examined: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISREG(found.st_mode) or not target.startswith("/memfd:"):
        raise _refused("it is not a memfd. Make the memory with memfd_create(2)")
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise _refused("it cannot be sealed. Create the memfd with MFD_ALLOW_SEALING") from error
    if (page_bytes := os.fstatvfs(descriptor).f_bsize) != mmap.PAGESIZE:
        raise _refused(
            f"it is made of reserved huge pages of {page_bytes} bytes, and a reader dies where none is left. Create "
            "the memfd without MFD_HUGETLB"
        )
    missing = [name for name, seal in REQUIRED_SEALS.items() if not seals & seal]
    if missing:
        raise _refused(f"it lacks the seals {', '.join(missing)}. Add them with fcntl(F_ADD_SEALS) once it is filled")
    if (largest := max(size_bytes, found.st_size)) > maximum_bytes:
        raise _refused(f"it has {largest} bytes, the host's memory and swap {maximum_bytes}: it cannot be filled")
    if found.st_size < size_bytes:
        raise _refused(f"it has {found.st_size} bytes, {size_bytes} are declared")


def _refused(why: str) -> BrokerError:
    return PublishRefused(f"the region is refused: {why}", reason=Reason.REGION_REFUSED)


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:  # it was not open: then there is nothing to give back, and the refusal says what is wrong
        return
