"""Does a checkpoint hold what was downloaded? The hub's cache knows the SHA-256 of each large file.

The files are read beside the load, which reads them anyway, by a thread with a low priority: the model can serve
before the answer is known. What was found whole once is remembered for as long as the files do not change.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from weight_broker.integrations.checkpoint.cache import CheckpointCache
from weight_broker.integrations.checkpoint.hub import known_sha256

_BUFFER_BYTES = 4 << 20
_NICENESS = 10


class DamageCheck:
    """Compares files with what the hub's cache knows of them, in the background."""

    def __init__(self, files: Sequence[Path]) -> None:
        """Files that the hub's cache does not know are not compared."""
        self._known = {file: sha256 for file in files if (sha256 := known_sha256(file))}
        self._reason = ""
        self._ended = threading.Event()
        self._started = self._stopped = False

    def start(self) -> None:
        """Without a thread the files are compared at once. Idempotent."""
        if self._started:
            return
        self._started = True
        if not self._known:
            self._ended.set()
            return
        try:
            threading.Thread(target=self._run_beside, name="checkpoint-damage", daemon=True).start()
        except RuntimeError:  # the system allows no more threads
            self._run()

    def stop(self) -> None:
        """The answer is not needed any more."""
        self._stopped = True

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def damage(self) -> str:
        """Which file is damaged, and how; empty if none is. Waits for the end of the comparison."""
        self.start()
        self._ended.wait()
        return self._reason

    def _run_beside(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)  # of this thread only
        self._run()

    def _run(self) -> None:
        try:
            for file, expected in self._known.items():
                if not self._reason and not self._stopped:
                    self._reason = self._compare(file, expected)
        except Exception as error:  # noqa: BLE001  # what is not known to be whole is not published
            self._reason = f"the checkpoint cannot be compared with what was downloaded: {error!r}"
        finally:
            self._ended.set()

    def _compare(self, file: Path, expected: str) -> str:
        store, remembered = CheckpointCache.of_user(), f"whole-sha256:{expected[:32]}"
        signature = store.signature([file], f"whole {expected}")
        if store.get(signature) == remembered:
            return ""
        found = self._sha256(file)
        if found == expected:
            if store.signature([file], f"whole {expected}") == signature:  # unchanged while it was read
                store.put(signature, remembered)
            return ""
        if self._stopped:
            return ""
        return f"{file} is damaged: its SHA-256 is {found}, and {expected} was downloaded; download it again"

    def _sha256(self, file: Path) -> str:
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES))
        with file.open("rb", buffering=0) as stream:
            while not self._stopped and (count := stream.readinto(buffer)):
                digest.update(buffer[:count])
        return digest.hexdigest()
