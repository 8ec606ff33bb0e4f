"""What an episode needs of a sandbox (docs/design.md#policy-and-sandbox), and what backends share.

The backends are `local/`, `docker/` and `harbor/`; `make.py` chooses between them.
"""

import functools
import importlib.resources
import pathlib
import re
import types
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from echo_jax.types import Status

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


class Verdict(NamedTuple):
    """What the task's tests said of the agent's work (docs/protocol.md#verifier)."""

    reward: float  # 0 if there is none
    status: Status  # OK, or VERIFIER_ERROR if there was no finite number in time
    reason: str = ''  # one line that explains a VERIFIER_ERROR
    output: str = ''  # the end of what the tests printed
    # Every number of the reward file by its key; that of reward.txt is `reward`.
    rewards: Mapping[str, float] = types.MappingProxyType({})


class SandboxError(RuntimeError):
    """The sandbox itself failed: the episode is an INFRA_ERROR, not the agent's fault."""

    def of(self, what: str) -> 'SandboxError':
        """The same kind of error, with a message that begins with what it befell."""
        return type(self)(f'{what}: {self}')


class SandboxUnavailable(SandboxError):
    """No sandbox of any task can be made for now: the engine that makes them does not answer."""


class Sandbox(Protocol):
    """One machine for one episode of one task.

    All methods raise SandboxError if the sandbox itself fails, and ValueError for a task that it
    cannot run. `stop` may be called at any time.
    """

    async def start(self) -> None:
        """Makes what the task's environment/ describes, and waits until it is ready."""

    async def run(self, command: str, timeout: float) -> CommandResult:
        """Runs a command of the agent's; `timeout` in seconds."""

    async def upload(self, path: pathlib.Path, target: str) -> None:
        """Copies a file to the path `target`, or a directory's content into it."""

    async def solve(self) -> CommandResult:
        """Runs the task's own solution as the agent, in the agent's time."""

    async def verify(self) -> Verdict:
        """Ends the agent's part, runs the task's tests, and reads the reward. Call it once."""

    async def stop(self) -> None:
        """Ends and removes everything."""


@functools.cache
def read_script(name: str) -> str:
    """The script scripts/NAME.sh, without its comments, since it runs where the agent may see it.

    Its parameters are arguments or variables of the environment; its text is never changed.
    """
    file = importlib.resources.files('echo_jax.sandbox') / 'scripts' / f'{name}.sh'
    return re.sub(r'^ *#.*\n', '', file.read_text(), flags=re.MULTILINE)
