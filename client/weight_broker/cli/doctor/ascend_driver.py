"""The doctor's checks of Ascend's driver that are rows of the proof too: those that are quick and disturb nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weight_broker.cli.doctor.findings import Finding, ok, problem, warning

DEVICES = Path("/proc/devices")
_CARD_GROUPS = ("devdrv-cdev", "davinci")
"""What has /dev/davinciN: in today's drivers, and in older ones."""
PORTS = ("HCCL_NPU_SOCKET_PORT_RANGE", "HCCL_HOST_SOCKET_PORT_RANGE")
_PROVE = "run `weight-broker doctor --prove` when no instance runs, and report it with proof.json"


def groups(devices: Path = DEVICES) -> Iterator[Finding]:
    """Whether systemd finds the cards by the names of deploy/systemd/npu.conf."""
    try:
        names = {line.split()[-1] for line in devices.read_text().splitlines() if line.strip()}
    except OSError:
        return
    found = [name for name in _CARD_GROUPS if name in names]
    if found:
        yield ok("device groups", f"{', '.join(found)} in {devices}")
    else:
        fix = f"add `DeviceAllow=char-NAME rw` with the driver's name from {devices} to npu.conf, if a unit needs it"
        yield warning("device groups", f"none of {', '.join(_CARD_GROUPS)} is in {devices}", fix)


def numbers(probed: Mapping[str, Any]) -> Finding:
    """Whether the runtime counts the card as its export keys do: sources are found by that number."""
    name = "card numbers"
    if words := probed.get("problem"):
        return warning(name, f"card 0 cannot be asked: {words}", "see the findings above; `npu-smi info`")
    if probed["number"] != probed["in_key"]:
        said = f"the runtime says {probed['number']} for card 0, its export key {probed['in_key']}"
        return problem(name, said, f"the broker would take one card for another: {_PROVE}")
    return ok(name, f"card 0 is {probed['number']}, by the runtime and by its export key")


def ports(who: str, variables: Mapping[str, str]) -> Iterator[Finding]:
    """HCCL listens on the same ports in every process of a card that does not say otherwise."""
    unset = [name for name in PORTS if not variables.get(name)]
    if unset:
        yield warning(
            "HCCL ports",
            f"{who} has HCCL's default ports: another process with them on its card fails with EJ0003 or EI0019",
            f"set {' and '.join(f'{name}=auto' for name in unset)} for it, if it shares its card with another engine",
        )
    else:
        yield ok("HCCL ports", f"{who} has {', '.join(f'{name}={variables[name]}' for name in PORTS)}")
