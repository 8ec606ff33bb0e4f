"""A sandbox in any of Harbor's environments: Docker Compose, Modal, Daytona, E2B, GKE, and so on.

For clusters without a Docker engine. Harbor is optional, and needs Python 3.12. What is isolated,
enforced and paid for is up to the environment; this module makes one persistent shell of it.

The shell. Harbor runs each command in a shell of its own. So one bash is left behind in the
environment, in a session of its own, that reads its commands from a FIFO: `cd`, variables,
functions and background jobs last because it is one shell, as in the local sandbox. A command is
one `exec` of Harbor's (scripts/harbor_run.sh): it writes the command to the FIFO, waits for the
report, and prints what the command wrote. `exit` and a timeout end that shell as they do there; the
next command gets a fresh one in the last known directory.

What it does not do. The agent's processes and harbor_run.sh have one user: an agent that looks for
the FIFO can forge the report of its own command, but no reward, since `reset`, before the verifier,
kills everything that began after the sandbox did. An environment that cannot forbid the network
refuses a task that wants none. The image needs bash, coreutils, util-linux and tar.
"""

import asyncio
import base64
import hashlib
import logging
import math
import os
import pathlib
import re
import secrets
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable
from typing import Any

from echo_jax.sandbox import SandboxError, channels, read_script, shell
from echo_jax.sandbox.shell import Ending
from echo_jax.types import Task

_SETUP_SEC = 60.0  # for what takes a second if nothing is wrong
_SLICE_SEC = 0.2  # between two looks at how much a command has written
_MAX_COMMAND = 90_000  # bytes of base64 in an argument, of which Linux takes 128 KiB


def check(environment: str) -> None:
    """ValueError if Harbor is missing, knows no such environment, or lacks what that needs."""
    try:
        from harbor.environments.factory import EnvironmentFactory
        from harbor.models.environment_type import EnvironmentType
    except ModuleNotFoundError as error:
        version = '.'.join(map(str, sys.version_info[:2]))
        raise ValueError(
            f"sandbox.backend='harbor' needs Harbor ({error}): pip install harbor, for Python 3.12 "
            f'or newer; this is {version}'
        ) from error
    known = [kind.value for kind in EnvironmentType]
    if environment not in known and ':' not in environment:
        raise ValueError(
            f'sandbox.harbor_environment is {environment!r}; expected MODULE:CLASS or one of '
            f'{", ".join(known)}'
        )
    own = environment if ':' in environment else None
    try:
        EnvironmentFactory.run_preflight(None if own else EnvironmentType(environment), own)
    except SystemExit as error:  # Harbor's way to say that credentials or a program are missing
        raise ValueError(f'sandbox.harbor_environment={environment!r}: {error}') from error


def create_environment(
    task: Task, environment: str, trial: pathlib.Path, *, memory_mb: int, disk_mb: int
) -> Any:
    """Harbor's environment of a task, not started; `trial` is a folder for what Harbor writes.

    `environment` is one of Harbor's names, or MODULE:CLASS. The task's variables are not given to
    it: Harbor would fill in the host's for `${NAME}`.
    """
    from harbor.environments.factory import EnvironmentFactory
    from harbor.models.environment_type import EnvironmentType
    from harbor.models.task.config import EnvironmentConfig, NetworkMode, NetworkPolicy
    from harbor.models.trial.paths import TrialPaths

    paths = TrialPaths(trial)
    paths.mkdir()
    # Images go by this name, so no two tasks may share one.
    unique = hashlib.sha256(task.task_id.encode()).hexdigest()[:8]
    common = dict(
        environment_dir=task.path / 'environment',
        environment_name=re.sub('[^a-z0-9]+', '-', f'{task.task_id.lower()}-{unique}').strip('-'),
        session_id=f'echo-jax-{secrets.token_hex(8)}',
        trial_paths=paths,
        task_env_config=EnvironmentConfig(
            build_timeout_sec=task.build_timeout_sec,
            docker_image=task.docker_image,
            cpus=task.cpus,
            memory_mb=memory_mb,
            storage_mb=disk_mb,
        ),
        network_policy=NetworkPolicy(
            network_mode=NetworkMode.PUBLIC if task.network else NetworkMode.NO_NETWORK
        ),
        logger=logging.getLogger(__name__),
    )
    if ':' in environment:
        return EnvironmentFactory.create_environment_from_import_path(environment, **common)
    return EnvironmentFactory.create_environment(EnvironmentType(environment), **common)


class HarborSandbox(shell.ShellSandbox):
    """One sandbox (docs/design.md#policy-and-sandbox). Start it once; after `stop` it is gone.

    `memory_mb` (default: the task's) and `disk_mb` are asked of the environment, in MiB.
    `output_bytes` of each stream of a command are kept, from its start. `create` makes the
    environment, as `create_environment` does.
    """

    startup_sec = 3 * _SETUP_SEC  # more than Harbor gets for one script, below
    _environment: Any  # of Harbor's
    _trial: Any  # a TemporaryDirectory, for what Harbor writes

    def __init__(
        self,
        task: Task,
        *,
        environment: str,
        memory_mb: int | None = None,
        disk_mb: int = 1024,
        output_bytes: int = 1 << 18,
        shell: str = 'persistent',
        create: Callable = create_environment,
    ):
        super().__init__(task, output_bytes, shell)
        self._env = task.env
        memory_mb = memory_mb or task.memory_mb or 1024
        self._make = lambda trial: create(
            task, environment, trial, memory_mb=memory_mb, disk_mb=disk_mb
        )
        self._folder = f'/tmp/.echo_jax-{secrets.token_hex(8)}'
        self._mark = f'echo_jax-{secrets.token_hex(8)}'
        self._environment = self._trial = None
        self._output = (b'', b'')  # of the last command

    async def start(self) -> None:
        """Builds or pulls what the environment needs, and starts it.

        Raises ValueError for a task that the environment refuses, SandboxError if it fails.
        """
        self._trial = tempfile.TemporaryDirectory(prefix='echo_jax-harbor-')
        try:
            seconds = self.task.build_timeout_sec + _SETUP_SEC
            await self._harbor('start', self._boot(), seconds)
            workdir = self.task.workdir or ''
            report = (await self._exec('harbor_start', workdir))[-1].split()
            if len(report) != 2:
                raise SandboxError(f'{self.task.task_id}: no bash answers in the environment')
            self._born = int(report[0])
            self._workdir = os.fsdecode(base64.b64decode(report[1]))
            await self._open_shell()
        except BaseException:  # cancelled or failed: nothing may stay behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """Deletes the environment. Safe to call twice, or unstarted."""
        environment, self._environment = self._environment, None
        trial, self._trial = self._trial, None
        try:
            if environment is not None:
                await self._harbor('stop', environment.stop(delete=True), _SETUP_SEC)
        finally:
            if trial is not None:
                trial.cleanup()

    # The rest is one sandbox's plumbing, from the outside in.

    async def _boot(self) -> None:
        self._environment = self._make(pathlib.Path(self._trial.name))
        await self._environment.start(force_build=False)

    def _running(self) -> bool:
        return self._environment is not None

    async def restore_tests(self) -> None:
        pass

    async def _put(self, directory: str, content: bytes) -> str:
        file = pathlib.Path(self._trial.name) / 'put.tar'
        file.write_bytes(content)
        put = self._environment.upload_file(file, f'{self._folder}/put.tar')
        await self._harbor('upload', put, _SETUP_SEC)
        return (await self._exec('harbor_put', directory))[-1]

    async def _harbor(self, what: str, work: Awaitable, seconds: float):
        """Harbor's answer; what it raises is a SandboxError, or a ValueError of the task."""
        try:
            async with asyncio.timeout(seconds):
                return await work
        except ValueError:
            raise
        except Exception as error:  # each of thirty environments raises what its own SDK does
            reason = ' '.join(str(error).split())[:500] or type(error).__name__
            raise SandboxError(f'{self.task.task_id}: Harbor cannot {what}: {reason}') from error

    async def _exec(self, name: str, *arguments: object, seconds: float = _SETUP_SEC) -> list[str]:
        """What a script printed up to its marked line, which comes last without the mark."""
        script = read_script(name)
        if name == 'harbor_put':
            script = read_script('put') + script
        words = ['bash', '-c', script, name, self._folder, self._mark, *map(str, arguments)]
        work = self._environment.exec(shlex.join(words), timeout_sec=math.ceil(seconds))
        result = await self._harbor('exec', work, seconds + _SETUP_SEC)
        lines = (result.stdout or '').splitlines()
        for last in range(len(lines) - 1, -1, -1):
            if lines[last].startswith(self._mark):
                return [*lines[:last], lines[last].removeprefix(self._mark).strip()]
        return ['']

    async def _end_all(self) -> None:
        if (await self._exec('harbor_kill', self._born))[-1] != 'clear':
            raise SandboxError(f'{self.task.task_id}: processes of the sandbox cannot be ended')

    async def _start_shell(self, line: str, nonce: str) -> None:
        report = await self._exec('harbor_open', _armoured(line.encode(errors='surrogateescape')))
        if not report[-1].startswith(f'{nonce} 0 '):
            raise EOFError

    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        line = _armoured(channels.command_lines(command, self._last_exit, nonce))
        if len(line) > _MAX_COMMAND:
            self._output = (b'', b'bash: Argument list too long\n')
            return Ending.REPORTED, 126
        slice_sec = min(timeout, _SLICE_SEC)
        slices = math.ceil(timeout / slice_sec)
        limits = (slices, slice_sec, shell.DISCARD_BYTES, self._output_bytes)
        lines = await self._exec('harbor_run', line, *limits, seconds=timeout + _SETUP_SEC)
        out, err = ['', '', *lines[:-1]][-2:]
        self._output = (base64.b64decode(out), base64.b64decode(err))
        kind, _, rest = lines[-1].partition(' ')
        if kind == nonce:
            code, _, self._cwd = rest.partition(' ')
            return Ending.REPORTED, int(code)
        if kind == 'dead':  # `exit` and the like
            return Ending.DEAD, int(rest)
        if kind == 'timeout':
            return Ending.TIMEOUT, -1
        # Too much output, or harbor_run.sh was killed.
        return (Ending.FLOOD if kind == 'flood' else Ending.LOST), shell.KILLED

    def _take_output(self) -> tuple[bytes, bytes]:
        return self._output


def _armoured(line: bytes) -> str:
    return base64.b64encode(line).decode()
