"""Work in a sandbox is tried again in a fresh one if the sandbox fails."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from echo_jax.sandbox import SandboxError, SandboxUnavailable

RETRY_AFTER = (1.0, 5.0, 25.0)  # seconds, after a sandbox that failed
AWAY_SEC = 900.0  # a machine that is overloaded takes minutes to bring an engine back
ASK_AGAIN_SEC = 2.0

_Result = TypeVar('_Result')


async def with_retries(
    attempt: Callable[[], Awaitable[_Result]],
    name: str,
    *,
    retry_after: Sequence[float] = RETRY_AFTER,
    away_sec: float = AWAY_SEC,
) -> _Result:
    """What `attempt()` returns, which is to use a sandbox of its own; `name` is for the log.

    After a SandboxError it is called again `retry_after` seconds later. While no sandbox can be
    made at all (SandboxUnavailable), that counts as no try: it is called again every few seconds,
    for `away_sec` seconds in all. Raises the last error, and any other one at once.
    """
    failures, waited = 0, 0.0
    while True:
        try:
            return await attempt()
        except SandboxUnavailable as error:
            if waited >= away_sec:
                raise
            if waited == 0.0:
                logging.warning('%s waits up to %.0f s: %s', name, away_sec, error)
            pause = ASK_AGAIN_SEC
            waited += pause
        except SandboxError as error:
            failures += 1
            logging.warning('%s, try %d of %d: %s', name, failures, len(retry_after) + 1, error)
            if failures > len(retry_after):
                raise
            pause = retry_after[failures - 1]
        await asyncio.sleep(pause)
