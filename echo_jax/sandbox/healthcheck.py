"""Waits until a task's environment is ready, by the task's healthcheck (docs/protocol.md#tasks)."""

import asyncio
from collections.abc import Awaitable, Callable

from echo_jax.sandbox import CommandResult, SandboxError
from echo_jax.types import Task


async def wait(task: Task, run: Callable[[str, float], Awaitable[CommandResult]]) -> None:
    """Runs the command of the task's healthcheck until it succeeds; returns at once if it has none.

    `run` takes a command and seconds. Failures of runs that begin in the start period do not count,
    as in Harbor; after it, `retries` in a row are a SandboxError.
    """
    check = task.healthcheck
    if check is None:
        return
    loop = asyncio.get_running_loop()
    start_ends = loop.time() + check.start_period_sec
    failures = 0
    while True:
        is_starting = loop.time() < start_ends
        result = await run(check.command, check.timeout_sec)
        if result.exit_code == 0:
            return
        if is_starting:
            await asyncio.sleep(check.start_interval_sec)
            continue
        failures += 1
        if failures >= check.retries:
            said = ' '.join((result.stderr or result.stdout).split())[-200:]
            raise SandboxError(
                f'{task.task_id}: the healthcheck {check.command!r} failed {failures} '
                f'times (exit code {result.exit_code}): {said or "no output"}'
            )
        await asyncio.sleep(check.interval_sec)
