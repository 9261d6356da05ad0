"""A process that speaks to the attach socket as nobody should: hostile_attacher DIRECTORY CONVERSATIONS."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys
from pathlib import Path

from support.raw_client import REGION_BYTES, connect, hello, sealed_memory
from weight_broker.v1 import attach_pb2 as pb

_SENSIBLE = (
    hello(),
    hello(),
    pb.AttachRequest(offer_region=pb.OfferRegion(region_id="r", size_bytes=REGION_BYTES)),
    pb.AttachRequest(offer_region=pb.OfferRegion(region_id="s", size_bytes=REGION_BYTES)),
    pb.AttachRequest(withdraw_region=pb.WithdrawRegion(region_id="r")),
    pb.AttachRequest(claim_region=pb.ClaimRegion(transfer_id="transfer-1", region_index=1 << 31)),
    pb.AttachRequest(goodbye=pb.Goodbye()),
    pb.AttachRequest(),
)
_SIZES = (1, 20, 1000, 16 * 1024, 100_000)
_DESCRIPTORS = (0, 0, 1, 1, 2, 100)


def converse(runtime_directory: Path, noise: random.Random) -> None:
    """Some packets, senseless ones among them, with too many descriptors, and an end without a word at any moment."""
    memory = sealed_memory()
    connection = connect(runtime_directory)
    with connection, contextlib.suppress(OSError):
        connection.settimeout(0.05)
        for number in range(noise.randrange(8)):
            packet = _SENSIBLE[0] if number == 0 and noise.random() < 0.7 else noise.choice(_SENSIBLE)
            wire = noise.randbytes(noise.choice(_SIZES)) if noise.random() < 0.2 else packet.SerializeToString()
            socket.send_fds(connection, [wire], [memory] * noise.choice(_DESCRIPTORS))
            if noise.random() < 0.5:
                connection.recv(1 << 16)
    os.close(memory)


if __name__ == "__main__":
    chance = random.Random(20)
    for _ in range(int(sys.argv[2])):
        converse(Path(sys.argv[1]), chance)
