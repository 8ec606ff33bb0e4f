"""Work in a sandbox is tried again in a fresh one if the sandbox fails."""

import asyncio
import logging
import time
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
    until `away_sec` seconds have passed since the first such error in a row, those included in
    which an engine hangs. Raises the last error, and any other one at once.
    """
    failures = 0
    away_since: float | None = None
    while True:
        try:
            return await attempt()
        except SandboxUnavailable as error:
            now = time.monotonic()
            if away_since is None:
                away_since = now
                logging.warning('%s waits up to %.0f s: %s', name, away_sec, error)
            if now - away_since >= away_sec:
                raise
            pause = ASK_AGAIN_SEC
        except SandboxError as error:
            failures, away_since = failures + 1, None
            logging.warning('%s, try %d of %d: %s', name, failures, len(retry_after) + 1, error)
            if failures > len(retry_after):
                raise
            pause = retry_after[failures - 1]
        await asyncio.sleep(pause)
