"""Asks a datasystem worker whether it runs.

The kernel accepts connections for a process that hangs, so a connection says nothing. But the worker speaks ZeroMQ,
whose two sides greet each other first.
"""

from __future__ import annotations

import asyncio

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 3.0
"""A worker that is silent for longer hangs."""
_GREETING = bytes([0xFF, 0, 0, 0, 0, 0, 0, 0, 1, 0x7F])
"""The signature with which ZMTP begins."""


async def answers(host: str, port: int) -> bool:
    """Whether the worker says anything to a greeting in time, or hangs up."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(host, port)
    except OSError:  # TimeoutError is one
        return False
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            writer.write(_GREETING)
            await reader.read(1)
    except TimeoutError:
        return False
    except OSError:  # it hung up
        return True
    finally:
        writer.close()
    return True
