"""What an episode needs of a sandbox (docs/design.md#policy-and-sandbox), and what backends share.

The backends are `local/`, `docker/` and `harbor.py`; `make.py` chooses between them.
"""

import functools
import importlib.resources
import pathlib
import re
from typing import NamedTuple, Protocol

PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
# The variables that every sandbox has; the image and the task may set others.
ENVIRONMENT = {'PATH': PATH, 'HOME': '/root', 'USER': 'agent', 'LANG': 'C.UTF-8', 'TERM': 'dumb'}
UID = 1000  # of the agent; not 0, since a root without capabilities confuses tar and its like


class CommandResult(NamedTuple):
    """How one command ended. Text is decoded as UTF-8 with replacement; NUL is kept as it came."""

    stdout: str
    stderr: str
    exit_code: int  # -1 if timed_out
    timed_out: bool


class SandboxError(RuntimeError):
    """The sandbox itself failed: the episode is an INFRA_ERROR, not the agent's fault."""


class Sandbox(Protocol):
    """One machine for one episode; one shell, so `cd` and variables last between commands."""

    async def start(self) -> None: ...

    async def run(self, command: str, timeout: float) -> CommandResult: ...

    async def upload(self, path: pathlib.Path, target: str) -> None: ...

    async def reset(self) -> None:
        """Kills everything the agent left running and opens a fresh shell."""

    async def stop(self) -> None: ...


@functools.cache
def read_script(name: str) -> str:
    """The script scripts/NAME.sh, without its comments, since it runs where the agent may see it.

    Its parameters are arguments or variables of the environment; its text is never changed.
    """
    file = importlib.resources.files('echo_jax.sandbox') / 'scripts' / f'{name}.sh'
    return re.sub(r'^ *#.*\n', '', file.read_text(), flags=re.MULTILINE)
