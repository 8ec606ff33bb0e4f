"""A sandbox in any of Harbor's environments: Docker Compose, Modal, Daytona, E2B, GKE, and so on.

For clusters without a Docker engine. Harbor is optional, and needs Python 3.12. What is isolated,
enforced and paid for is the environment's; this module makes one persistent shell of it.

The shell. Harbor runs each command in a shell of its own. So one bash is left behind in the
environment, in a session of its own, that reads its commands from a FIFO: `cd`, variables,
functions and background jobs last because it is one shell, as in `local.py`. A command is one
`exec` of Harbor's: a driver writes it to the FIFO, waits for the report, and prints what the
command wrote. `exit` and a timeout end that shell as they do there; the next command gets a fresh
one in the last known directory.

What it does not do. The agent's processes and the driver are one user: one that looks for the FIFO
can forge the report of its own command, but no reward, since `reset`, before the verifier, kills
everything that began after the sandbox did. An environment that cannot forbid the network refuses a
task that wants none. The image needs bash, coreutils, util-linux and tar.
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

from echo_jax.sandbox import CommandResult, SandboxError, channels, shell
from echo_jax.types import Task

_SETUP_SEC = 60.0  # for what takes a second where nothing is wrong
_SLICE_SEC = 0.2  # between two looks at how much a command has written
_DISCARD_BYTES = 64 << 20  # output beyond this ends the command
_MAX_COMMAND = 90_000  # bytes of base64 in an argument, of which Linux takes 128 KiB
_KILLED = 137

# A script's last line begins with {mark}. {folder} holds the FIFOs `in` and `done` and the files
# `out` and `err` of the shell. {born}: field 22 of /proc/PID/stat, ticks since the machine started.
_START = """
mkdir -m 700 {folder} || exit
w={workdir}; [ "$w" ] || {{ w=$PWD; [ "$w" != / ] || w=/app; }}
mkdir -p "$w"; cd "$w" || exit
mkdir -p /logs/agent /logs/verifier /logs/artifacts
read -r stat </proc/$$/stat; set -- ${{stat##*) }}
echo "{mark} ${{20}} $(printf %s "$PWD" | base64 -w 0)"
"""
# Its stdout is the report's FIFO, 8 and 9 are the real streams (channels.script). Its parent tells
# how it died. `setsid --fork` and no `&`, which would make all in it ignore SIGINT.
_OPEN = """
mkdir -p -m 700 {folder} && cd {folder} && rm -f in done && mkfifo in done || exit
: >out && : >err && exec 4<>in 3<>done || exit
setsid --fork bash -c '
  exec 5<>in 3<>done
  bash --norc --noprofile -s <&5 >done 8>>out 9>>err 2>&9 3<&- 5<&-
  echo "dead $?" >&3' </dev/null >/dev/null 2>&1 3<&- 4<&-
printf %s {line} | base64 -d >&4
read -r -t 20 report <&3; echo "{mark} $report"
"""
_RUN = """
cd {folder} && exec 4<>in 3<>done || {{ printf '\\n\\n{mark} gone\\n'; exit; }}
printf %s {line} | base64 -d >&4
left={slices} report=
until read -r -t {slice} part <&3 && report=$report$part; do
  report=$report$part
  (( --left > 0 )) || {{ report=timeout; break; }}
  (( $(stat -c %s out) + $(stat -c %s err) < {discard} )) || {{ report=flood; break; }}
done
for f in out err; do head -c {keep} $f | base64 -w 0; echo; : >$f; done
echo "{mark} $report"
"""
# All that is younger than the sandbox, but this shell and what it runs under. In rounds: a fork
# bomb makes new ones meanwhile.
_KILL = """
mine=" 1 $$ " p=$$
while (( p > 1 )); do
  read -r stat </proc/$p/stat; set -- ${{stat##*) }}; p=$2 mine="$mine$p "
done
for round in {{1..200}}; do
  found=
  for dir in /proc/[0-9]*; do
    case $mine in *" ${{dir#/proc/}} "*) continue; esac
    {{ read -r stat <$dir/stat; }} 2>/dev/null || continue
    set -- ${{stat##*) }}
    [[ $1 != Z ]] && (( ${{20}} >= {born} )) && kill -9 ${{dir#/proc/}} 2>/dev/null && found=1
  done
  [[ $found ]] || {{ echo "{mark} clear"; exit; }}
done
"""
_PUT = """
t={target}; cd {folder} || exit
[[ $(realpath -m -- "$t") == "$t" ]] || {{ echo "{mark} a link lies on the way"; exit; }}
error=$( {{ mkdir -p -- "$t" && tar -xpf put.tar --no-same-owner -C "$t"; }} 2>&1) && error=done
rm -f put.tar; echo "{mark} ${{error//$'\\n'/; }}"
"""
_GET = """
f={path}
[[ -f $f && ! -L $f ]] && echo "{mark} file $(head -c {count} "$f" | base64 -w 0)" || echo "{mark}"
"""


def check(environment: str) -> None:
    """ValueError where Harbor is missing, knows no such environment, or lacks what that needs."""
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
    except SystemExit as error:  # so Harbor says that credentials or a program are missing
        raise ValueError(f'sandbox.harbor_environment={environment!r}: {error}') from error


def create_environment(
    task: Task, environment: str, trial: pathlib.Path, *, memory_mb: int, disk_mb: int
):
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
            network_mode=NetworkMode.PUBLIC if task.allow_internet else NetworkMode.NO_NETWORK
        ),
        logger=logging.getLogger(__name__),
    )
    if ':' in environment:
        return EnvironmentFactory.create_environment_from_import_path(environment, **common)
    return EnvironmentFactory.create_environment(EnvironmentType(environment), **common)


class HarborSandbox(shell.ShellSandbox):
    """One sandbox (DESIGN 3.7). Start it once; after `stop` it is gone for good.

    `memory_mb` (default: the task's) and `disk_mb` are asked of the environment, in MiB.
    `output_bytes` of each stream of a command are kept, from its start. `create` makes the
    environment, as `create_environment` does.
    """

    def __init__(
        self,
        task: Task,
        *,
        environment: str,
        memory_mb: int | None = None,
        disk_mb: int = 1024,
        output_bytes: int = 1 << 18,
        create: Callable = create_environment,
    ):
        super().__init__(output_bytes)
        self.task = task
        memory_mb = task.memory_mb if memory_mb is None else memory_mb
        self._make = lambda trial: create(
            task, environment, trial, memory_mb=memory_mb, disk_mb=disk_mb
        )
        self._folder = f'/tmp/.echo_jax-{secrets.token_hex(8)}'
        self._mark = f'echo_jax-{secrets.token_hex(8)}'
        self._environment = self._trial = None
        self._workdir = ''  # quoted for bash

    async def start(self) -> None:
        """Builds or pulls what the environment needs, and starts it.

        Raises ValueError for a task that the environment refuses, SandboxError where it fails.
        """
        self._trial = tempfile.TemporaryDirectory(prefix='echo_jax-harbor-')
        try:
            seconds = self.task.build_timeout_sec + _SETUP_SEC
            await self._harbor('start', self._boot(), seconds)
            named = self.task.workdir != Task.workdir
            workdir = channels.quote(self.task.workdir if named else '')
            report = (await self._exec(_START, workdir=workdir))[-1].split()
            if len(report) != 2:
                raise SandboxError(f'{self.task.task_id}: no bash answers in the environment')
            self._born = int(report[0])
            self._workdir = channels.quote(os.fsdecode(base64.b64decode(report[1])))
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

    async def _put(self, directory: str, content: bytes) -> str:
        file = pathlib.Path(self._trial.name) / 'put.tar'
        file.write_bytes(content)
        put = self._environment.upload_file(file, f'{self._folder}/put.tar')
        await self._harbor('upload', put, _SETUP_SEC)
        return (await self._exec(_PUT, target=channels.quote(directory)))[-1]

    async def _get(self, path: str, count: int) -> str:
        return (await self._exec(_GET, path=channels.quote(path), count=count))[-1]

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

    async def _exec(self, script: str, seconds: float = _SETUP_SEC, **values) -> list[str]:
        """What a script printed up to its marked line, which comes last without the mark."""
        script = script.format(folder=self._folder, mark=self._mark, **values)
        work = self._environment.exec(
            f'bash -c {shlex.quote(script)}', timeout_sec=math.ceil(seconds)
        )
        result = await self._harbor('exec', work, seconds + _SETUP_SEC)
        lines = (result.stdout or '').splitlines()
        for last in range(len(lines) - 1, -1, -1):
            if lines[last].startswith(self._mark):
                return [*lines[:last], lines[last].removeprefix(self._mark).strip()]
        return ['']

    async def _end_all(self) -> None:
        if (await self._exec(_KILL, born=self._born))[-1] != 'clear':
            raise SandboxError(f'{self.task.task_id}: processes of the sandbox cannot be ended')
        self._shell = None

    async def _open_shell(self) -> None:
        for attempt in (1, 2):
            nonce = secrets.token_hex(8)
            exports = ''.join(f'export {k}={channels.quote(v)};' for k, v in self.task.env.items())
            line = f'cd -- {self._cwd or self._workdir} || cd -- {self._workdir};unset OLDPWD;'
            line += f'{exports}{channels.report(nonce)}\n'
            report = (await self._exec(_OPEN, line=_armoured(line.encode())))[-1]
            if report.startswith(f'{nonce} 0 '):
                self._shell, self._last_exit = nonce, 0
                return
            if attempt == 2:
                raise SandboxError(f'{self.task.task_id}: no shell starts in the environment')
            await self._kill()  # a fork bomb, perhaps

    async def _run(self, command: str, timeout: float) -> CommandResult:
        nonce = secrets.token_hex(8)
        script = channels.script(command, self._last_exit, nonce)
        line = _armoured(script)
        if len(line) > _MAX_COMMAND:
            return CommandResult('', 'bash: Argument list too long\n', 126, False)
        slice_sec = min(timeout, _SLICE_SEC)
        lines = await self._exec(
            _RUN,
            timeout + _SETUP_SEC,
            line=line,
            slices=math.ceil(timeout / slice_sec),
            slice=slice_sec,
            discard=_DISCARD_BYTES,
            keep=self._output_bytes,
        )
        out, err = (base64.b64decode(text) for text in ['', '', *lines[:-1]][-2:])
        kind, _, rest = lines[-1].partition(' ')
        self._last_exit, exit_code = 0, _KILLED
        if kind == nonce:
            code, _, self._cwd = rest.partition(' ')
            self._last_exit = exit_code = int(code)
        elif kind == 'dead':  # `exit` and the like: the background lives on
            self._shell, exit_code = None, int(rest)
        else:  # too late, too much, or the driver was killed
            await self._kill()
            exit_code = -1 if kind == 'timeout' else _KILLED
        texts = (stream.decode(errors='replace') for stream in (out, err))
        return CommandResult(*texts, exit_code, kind == 'timeout')


def _armoured(line: bytes) -> str:
    return base64.b64encode(line).decode()
