"""What has to be there before the broker uses NPUs. Without it, card processes end with words that name no cause."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

from weight_broker.drivers import ascend_requirements, cann_symbols, hdk
from weight_brokerd.cards.configuration import CardsConfiguration
from weight_brokerd.config.errors import StartError

_PACKAGE = "yr.datasystem"


async def require(configuration: CardsConfiguration, driver: Path = hdk.VERSION_FILE) -> None:
    """Raises StartError with all that is missing and what to install."""
    problems = [
        ascend_requirements.driver_problem(hdk.installed_version(driver)),
        ascend_requirements.datasystem_problem(_datasystem()),
        await _cann(configuration),
    ]
    if found := [problem for problem in problems if problem]:
        raise StartError(". ".join(found))


def _datasystem() -> str | None:
    try:
        spec = importlib.util.find_spec(_PACKAGE)
    except ImportError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None  # the managed worker and the card processes say so, and look again
    return ascend_requirements.installed_datasystem(Path(spec.submodule_search_locations[0]))


async def _cann(configuration: CardsConfiguration) -> str:
    """Empty also if the program that looks ends by itself: then the cards' own words are better."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        cann_symbols.__name__,
        env=configuration.child_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(configuration.start_seconds):
            printed, _ = await process.communicate()
    except TimeoutError:
        return f"CANN's libraries do not load within {configuration.start_seconds:g} s (cards.start_seconds)"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    looked = cann_symbols.parse(printed.decode(errors="replace"))
    return ascend_requirements.cann_problem(looked) if looked is not None else ""
