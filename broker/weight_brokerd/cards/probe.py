"""Finds the cards of this host in a separate process: a process that asks the driver opens a device."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from weight_broker.drivers.error import DriverError
from weight_brokerd.cards.configuration import CardsConfiguration


@dataclass(frozen=True, slots=True)
class Device:
    """A card, as card processes see it."""

    index: int
    """For set_device."""
    identity: str
    """The physical card, as regions name it: `Region.device_id`."""
    soc: str
    problem: str = ""
    """The driver's words if the card cannot be opened."""


FindDevices = Callable[[], Iterator[Device]]


async def find_devices(configuration: CardsConfiguration) -> tuple[tuple[Device, ...], str]:
    """The cards, and the driver's words if it does not answer."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "weight_brokerd.cards.probe",
        f"--kind={configuration.kind}",
        env=configuration.child_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(configuration.start_seconds):
            out, err = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            return (), f"the driver did not list its devices within {configuration.start_seconds:g} s"
        raise
    try:
        found = json.loads(out)
        return tuple(Device(**device) for device in found["devices"]), found["problem"]
    except (ValueError, KeyError, TypeError, RecursionError):
        words = err.decode(errors="replace").strip().splitlines()
        return (), f"looking for devices ended with {process.returncode}" + (f": {words[-1]}" if words else "")


def main() -> None:
    """Print the devices as JSON."""
    parser = argparse.ArgumentParser(prog="weight_brokerd.cards.probe")
    parser.add_argument("--kind", required=True, help="a module of weight_brokerd.cards.child that has find_devices")
    find: FindDevices = importlib.import_module(f"weight_brokerd.cards.child.{parser.parse_args().kind}").find_devices
    devices: list[Device] = []
    problem = ""
    try:
        devices.extend(find())
    except DriverError as error:
        problem = str(error)
    sys.stdout.write(json.dumps({"devices": [asdict(device) for device in devices], "problem": problem}))


if __name__ == "__main__":
    main()
