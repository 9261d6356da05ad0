"""What processes may take of this broker, from the settings and from what the system lets the broker have."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from weight_brokerd.config.settings import LimitSettings
from weight_brokerd.core.conduct.pace import Pace
from weight_brokerd.core.conduct.quota import Bound, Quota

OPEN_FILES = "LimitNOFILE"
"""What operators raise to let the broker have more file descriptors."""
ACQUIRE = "/weight_broker.v1.WeightBrokerService/Acquire"
WATCHES = (
    "/weight_broker.v1.InspectionService/Watch",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
_OWN_DESCRIPTORS = 64
"""Of the daemon itself: sockets, pipes of its processes, libraries."""
_SHARE_OF_CONNECTIONS = 4
"""One part in so many is for gRPC connections."""
_DESCRIPTORS_PER_CONNECTION = 3
"""The client's, and both ends of the one to the gRPC server."""
_USER_PACE = 4
"""All processes of a user together may ask so many times faster than one."""
_BURST_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Quotas:
    """One broker's."""

    regions: Quota
    descriptors: Quota
    acquires: Quota
    watches: Quota
    process_pace: Pace
    user_pace: Pace
    open_files: int


def descriptors_to_lend(open_files: int) -> int:
    """How many of its descriptors a broker has for instances and regions."""
    return max(1, open_files - open_files // _SHARE_OF_CONNECTIONS - _OWN_DESCRIPTORS)


def connections_to_keep(open_files: int) -> int:
    """How many gRPC connections a broker keeps open."""
    return max(1, open_files // _SHARE_OF_CONNECTIONS // _DESCRIPTORS_PER_CONNECTION)


def make_quotas(limits: LimitSettings, open_files: int | None = None) -> Quotas:
    """`open_files`: how many descriptors the broker may have; what the system says if None."""
    if open_files is None:
        open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lent = descriptors_to_lend(open_files)
    pool, half = Bound(OPEN_FILES, lent), Bound(OPEN_FILES, max(1, lent // 2))
    rate = float(limits.calls_per_second)
    return Quotas(
        regions=Quota("regions", pool, Bound("limits.regions_per_process", limits.regions_per_process)),
        descriptors=Quota("descriptors of the broker's", pool, half),
        acquires=Quota(
            "open Acquire calls",
            Bound("limits.acquires", limits.acquires),
            Bound("limits.acquires_per_process", limits.acquires_per_process),
        ),
        watches=Quota(
            "open Watch calls",
            Bound("limits.watches", limits.watches),
            Bound("limits.watches_per_process", limits.watches_per_process),
        ),
        process_pace=Pace(rate, max(1.0, rate * _BURST_SECONDS)),
        user_pace=Pace(_USER_PACE * rate, max(1.0, _USER_PACE * rate * _BURST_SECONDS)),
        open_files=open_files,
    )
