"""One emulated host with Ascend cards, seen from a test: its processes' environment, its faults, its counters.

Everything is in files of the host's state directory (board.c, accounting.c), so it can be read and changed while the
processes run, and read after they are dead. This module loads no code of the double.
"""

from __future__ import annotations

import enum
import mmap
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from doubles.cann.build import build

FAULTS_OFFSET, FAULTS, FAULT = 16, 64, struct.Struct("=iiiid")
SEGMENTS_OFFSET, SEGMENTS, SEGMENT = 2088, 16384, struct.Struct("=QQi124x72i")
SHEET_HEAD, SHEET_ENTRY = struct.Struct("=8sQ"), struct.Struct("=24sq")

LIVE = (
    "allocations",
    "host_allocations",
    "physical_handles",
    "reservations",
    "mappings",
    "exports",
    "imports",
    "streams",
    "events",
    "notifies",
    "communicators",
    "pending_tasks",
)
"""Counters of what a process has and should not have when it is done."""


class Fault(enum.IntEnum):
    """What can be made to go wrong; faults.c has the same list."""

    PEER_LOSS_ERROR = 1
    """A task whose peer is lost fails. Without it the task hangs, as on hardware."""
    PEER_LOST = 2
    """Every peer counts as lost."""
    SLOW_LINK = 3
    """`value`: bytes per second, at the receiver; also of copies from another card's memory."""
    CORRUPT_LINK = 4
    """One bit of each buffer that is received is wrong."""
    IMPORT_REFUSED = 5
    EXPORT_REFUSED = 6
    OUT_OF_MEMORY = 7
    ASYNC_ERROR = 8
    """The next task on a stream fails; the stream is broken from then on."""
    DEVICE_RESET = 9
    """A process that meets it has lost the card for good."""
    CARD_UNAVAILABLE = 10
    """aclrtSetDevice fails."""
    SLOW_COMMUNICATOR = 11
    """`value`: seconds that one rank needs to set up a communicator."""
    NO_PEER_ACCESS = 12
    """The card reaches no memory of other cards."""


class CannHost:
    """A host: its cards, its processes, its faults. A context manager; its directory is gone at the end.

    Cards are counted in three ways. Here, and in every method, as its processes count them: from 0. `logical` is the
    number of the same card in their container, and `physical` is the host's, by which the broker names it. All three
    differ.
    """

    def __init__(self, *, cards: int = 8, card_bytes: int = 4 << 30, release: str = "8.5") -> None:
        self.cards = cards
        self.card_bytes = card_bytes
        self.release = release
        self.directory = Path(tempfile.mkdtemp(prefix="cann-"))  # short: there are sockets in it
        namespace = Path("/proc/self/ns/mnt").stat().st_ino
        (self.directory / "host_mount_namespace").write_text(f"{namespace}\n")

    @staticmethod
    def logical(card: int) -> int:
        """The container has one card more than its processes see."""
        return card + 1

    @staticmethod
    def physical(card: int) -> int:
        """The container has every other card of the host."""
        return 2 * card + 3

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def environment(
        self,
        *,
        faults: Mapping[Fault, float] | None = None,
        strict: bool = True,
        visible: str | None = None,
        container: Sequence[int] | None = None,
    ) -> dict[str, str]:
        """The variables of a process on this host, to be added to others.

        `visible`: ASCEND_RT_VISIBLE_DEVICES, in logical numbers; "" leaves it out. `container`: the physical numbers of
        the cards of its container.
        """
        built = build(self.release)
        if container is None:
            container = [self.physical(card) for card in range(-1, self.cards)]
        if visible is None:
            visible = ",".join(str(self.logical(card)) for card in range(self.cards))
        variables = {
            "LD_LIBRARY_PATH": str(built.libraries),
            "LD_PRELOAD": str(built.preload),
            "CANN_DOUBLE_STATE": str(self.directory),
            "CANN_DOUBLE_RELEASE": self.release,
            "CANN_DOUBLE_DEVICES": ",".join(map(str, container)),
            "CANN_DOUBLE_CARD_BYTES": str(self.card_bytes),
            "CANN_DOUBLE_STRICT": str(int(strict)),
        }
        if faults:
            variables["CANN_DOUBLE_FAULTS"] = ";".join(f"{kind.name.lower()}={value}" for kind, value in faults.items())
        if visible:
            variables["ASCEND_RT_VISIBLE_DEVICES"] = visible
        return variables

    def inject(self, fault: Fault, *, pid: int = 0, card: int = -1, value: float = 0.0, times: int = -1) -> None:
        """From now on. `pid` 0: every process; `card` -1: every card; `times` -1: until `clear`."""
        physical = self.physical(card) if card >= 0 else -1
        with self._map_faults() as faults:
            for offset in range(FAULTS_OFFSET, FAULTS_OFFSET + FAULTS * FAULT.size, FAULT.size):
                if not FAULT.unpack_from(faults, offset)[0]:
                    FAULT.pack_into(faults, offset, 0, pid, physical, times, value)
                    struct.pack_into("=i", faults, offset, fault)  # last: now the rule is valid
                    return
        raise AssertionError(f"more than {FAULTS} faults at a time")

    def clear(self, fault: Fault | None = None) -> None:
        """No such fault from now on; without an argument: none at all."""
        with self._map_faults() as faults:
            for offset in range(FAULTS_OFFSET, FAULTS_OFFSET + FAULTS * FAULT.size, FAULT.size):
                if fault is None or FAULT.unpack_from(faults, offset)[0] == fault:
                    struct.pack_into("=i", faults, offset, 0)

    def processes(self) -> list[int]:
        """The pids of all processes that have used the double here, dead ones too."""
        return sorted(int(path.name) for path in self.directory.glob("processes/*") if not path.suffix)

    def counters(self, pid: int) -> dict[str, int]:
        """All counters of a process. Of a dead one: what they were at its end."""
        sheet = (self.directory / "processes" / str(pid)).read_bytes()
        magic, entries = SHEET_HEAD.unpack_from(sheet)
        assert magic == b"CANNDBL1", f"process {pid} has not finished starting"
        rows = (SHEET_ENTRY.unpack_from(sheet, SHEET_HEAD.size + i * SHEET_ENTRY.size) for i in range(entries))
        return {name.rstrip(b"\0").decode(): value for name, value in rows}

    def live(self, pid: int) -> dict[str, int]:
        """The counters of LIVE that are not zero."""
        return {name: value for name, value in self.counters(pid).items() if name in LIVE and value}

    def violations(self, pid: int | None = None) -> list[str]:
        """What a process, or any process, did wrong."""
        paths = self.directory.glob(f"processes/{pid if pid is not None else '*'}.violations")
        return [line for path in sorted(paths) for line in path.read_text().splitlines()]

    def used_bytes(self) -> dict[int, int]:
        """The memory in use on each card that has any, for as long as some living process holds it."""
        path = self.directory / "board"
        used: Counter[int] = Counter()
        if not path.exists():
            return used
        board = path.read_bytes()[SEGMENTS_OFFSET : SEGMENTS_OFFSET + SEGMENTS * SEGMENT.size]
        cards = {self.physical(card): card for card in range(-1, self.cards)}
        for serial, size, physical, *holders in SEGMENT.iter_unpack(board):
            pids_and_handles = zip(holders[::3], holders[1::3], strict=True)
            if serial and any(handles and is_alive(pid) for pid, handles in pids_and_handles):
                used[cards[physical]] += size
        return used

    def _map_faults(self) -> mmap.mmap:
        size = FAULTS_OFFSET + FAULTS * FAULT.size
        path = self.directory / "board"
        path.touch(mode=0o600)
        with path.open("r+b") as file:
            if path.stat().st_size < size:
                file.truncate(size)
            return mmap.mmap(file.fileno(), size)


def card_name(card: int) -> str:
    """A card's name on the wire: by its physical number."""
    return f"npu:{CannHost.physical(card)}"


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
