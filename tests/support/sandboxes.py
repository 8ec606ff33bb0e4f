"""Sandboxes that are open for the length of a `with`, and what a backend lacks on this machine."""

import contextlib
import functools

from echo_jax.sandbox import SandboxError, local

SEC = 30.0  # for commands that should end by themselves, on a machine that may be busy


@functools.cache
def refusal(backend: str) -> str:
    """Why the local backend does not work here; '' if it does."""
    try:
        local.check(backend)
    except SandboxError as error:
        return str(error)
    return ''


@contextlib.asynccontextmanager
async def opened(sandbox):
    """Starts a sandbox, and stops it at the end."""
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


async def results(sandbox, commands, timeout: float):
    """The results of the commands in one sandbox, which must still work after them."""
    async with opened(sandbox):
        found = [await sandbox.run(command, timeout) for command in commands]
        alive = await sandbox.run('echo a*live', SEC)
        assert alive.stdout.endswith('a*live\n'), alive
        return found
