"""What an episode needs of a sandbox (DESIGN 3.7): `local.py`, `docker.py`, `harbor.py`."""

import pathlib
from typing import NamedTuple, Protocol


class CommandResult(NamedTuple):
    """One command's end. Text is decoded as UTF-8 with replacement; NUL is kept as it came."""

    stdout: str
    stderr: str
    exit_code: int  # -1 where timed_out
    timed_out: bool


class SandboxError(RuntimeError):
    """The sandbox itself failed: the episode is an INFRA_ERROR, not the agent's fault."""


class Sandbox(Protocol):
    """One machine for one episode; one shell, so `cd` and variables last between commands."""

    async def start(self) -> None: ...

    async def run(self, command: str, timeout: float) -> CommandResult: ...

    async def upload(self, path: pathlib.Path, target: str) -> None: ...

    async def read(self, path: str) -> bytes: ...

    async def reset(self) -> None:
        """Kills everything the agent left running and opens a fresh shell."""

    async def stop(self) -> None: ...
