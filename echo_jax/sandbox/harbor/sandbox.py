"""The shell that an episode has in an environment of Harbor's, while a trial waits for its end.

Harbor runs each command in a shell of its own, by `exec`. What is isolated, enforced and paid for
is up to the environment.

Fresh: a command is one `exec` (scripts/harbor_fresh.sh), in a `bash -c` as Harbor's agents have it.
One that runs over its time is killed with all that began after it did, in the background too.

Persistent: one bash is left behind in the environment, in a session of its own, that reads its
commands from a FIFO: `cd`, variables, functions and background jobs last because it is one shell,
as in the local sandbox. A command is one `exec` of Harbor's (scripts/harbor_run.sh): it writes the
command to the FIFO, waits for the report, and prints what the command wrote. `exit` ends that shell
as it does there, and a timeout ends everything that began after the sandbox did; the next command
gets a fresh one in the last known directory. The agent's processes and harbor_run.sh have one user:
an agent that looks for the FIFO can forge the report of its own command, but no reward.

The image needs bash and coreutils, and util-linux for the persistent shell.
"""

import asyncio
import base64
import dataclasses
import math
import os
import pathlib
import secrets
import shlex
import tempfile
import time
from collections.abc import Coroutine, Mapping
from typing import Any, NamedTuple

from echo_jax.sandbox import CommandResult, SandboxError, Verdict, channels, read_script, shell
from echo_jax.sandbox.harbor.trial import Trial, on_harbors_loop, one_line
from echo_jax.sandbox.shell import Ending
from echo_jax.types import Task

_SETUP_SEC = 60.0  # for what takes a second if nothing is wrong
_STOP_SEC = 300.0  # for Harbor to collect what it collects and to delete the environment
_SLICE_SEC = 0.2  # between two looks at how much a command has written
_MAX_COMMAND = 120_000  # bytes of base64 in an argument, of which Linux takes 128 KiB
_NO_BASH = (126, 127)  # exit codes of an `exec` whose bash cannot be run
# A script and a command are variables and not arguments, so that `ps` does not show them to the
# agent. The command becomes the third argument.
_RUN = """exec bash -c 's=$ECHO_JAX_SCRIPT; set -- "$1" "$2" "$ECHO_JAX_COMMAND" "${@:3}"
unset ECHO_JAX_SCRIPT ECHO_JAX_COMMAND; eval "$s"' bash """


class _Answer(NamedTuple):
    """What a script answered."""

    lines: list[str]  # what it printed before its report
    report: str  # its marked line, without the mark; '' if there is none
    exit_code: int
    text: str  # all that it printed


class HarborSandbox(shell.ShellSandbox):
    """One sandbox (docs/design.md#policy-and-sandbox). Start it once; after `stop` it is gone.

    `environment` is one of Harbor's names, or MODULE:CLASS. `output_bytes` of each stream of a
    command are kept, from its start.
    """

    startup_sec = 3 * _SETUP_SEC  # more than Harbor gets for one script, below
    agent_owns_bash = True  # if the image makes it root

    def __init__(
        self,
        task: Task,
        *,
        environment: str,
        output_bytes: int = 1 << 18,
        shell: str = 'persistent',
    ):
        # What a task needs of Harbor is here.
        super().__init__(dataclasses.replace(task, needs_harbor=()), output_bytes, shell)
        self._kind = environment
        self._folder = f'/tmp/.echo_jax-{secrets.token_hex(8)}'
        self._mark = f'echo_jax-{secrets.token_hex(8)}'
        self._environment: Any = None  # Harbor's, while the agent may use it
        self.trial: Trial | None = None
        self.logs: tempfile.TemporaryDirectory | None = None  # for what Harbor writes
        self._born = self._spared = 0  # when the sandbox began; what is older than _spared lives on
        self._output = (b'', b'')  # of the last command

    async def start(self) -> None:
        """Builds or pulls what the environment needs, starts it, and waits until it is healthy.

        Raises ValueError for a task that Harbor or the environment refuses, SandboxError if it
        fails.
        """
        self.logs = tempfile.TemporaryDirectory(
            prefix='echo_jax-harbor-', ignore_cleanup_errors=True
        )
        try:
            self.trial = Trial(self.task, self._kind, pathlib.Path(self.logs.name))
            self._environment = await self._harbor('start it', self.trial.begin(), None)
            if self.trial.refusal:
                return  # its solution or nothing; no command will come
            answer = await self._exec('harbor_start')
            report = answer.report.split()
            if len(report) != 2:
                raise SandboxError(
                    f'{self.task.task_id}: no command runs in the environment: '
                    f'{one_line(answer.text)}'
                )
            self._born = self._spared = int(report[0])
            self._workdir = os.fsdecode(base64.b64decode(report[1]))
            if not self._is_fresh:
                await self._open_shell()
        except BaseException:  # cancelled or failed: nothing may stay behind
            await self.stop()
            raise

    async def run(self, command: str, timeout: float) -> CommandResult:
        trial = self._require_trial()
        if trial.refusal:
            raise ValueError(
                f'{self.task.task_id} has {trial.refusal}, which an episode cannot have; '
                'leave the task out (its own solution can be run)'
            )
        return await super().run(command, timeout)

    async def run_apart(
        self, command: str, timeout: float, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        if not self._is_fresh:
            return await super().run_apart(command, timeout, env)
        exports = ''.join(f'export {k}={channels.quote(v)};' for k, v in (env or {}).items())
        return await self._run(exports + command, timeout)

    async def upload(self, path: pathlib.Path, target: str) -> None:
        """As Harbor's environment copies files: into a directory that is there, for root."""
        self._require_running()
        is_directory = path.is_dir()
        copy = self._environment.upload_dir if is_directory else self._environment.upload_file
        await self._harbor('upload', copy(path, target), _SETUP_SEC)

    async def solve(self) -> CommandResult:
        """Runs the task's own solution as Harbor's oracle does. Raises ValueError if there is none.

        After the solutions of all [[steps]] the trial has ended, and `verify` says how.
        """
        trial, limit, started = self._require_trial(), self.task.agent_timeout_sec, time.monotonic()
        late = False
        try:
            # Harbor ends it in time; our limit is for an environment that does not answer.
            ours = None if trial.has_steps else limit + _SETUP_SEC
            await self._harbor('run the solution', trial.solve(), ours)
        except SandboxError as error:
            missing = error.__cause__
            if isinstance(missing, FileNotFoundError):
                raise ValueError(f'{self.task.task_id}: {missing}; the oracle runs it') from error
            late = time.monotonic() - started >= int(limit)
            if not late:
                raise
        printed, code = trial.solution_output()
        return CommandResult(printed, '', -1 if late else code, late)

    async def verify(self) -> Verdict:
        """Ends the agent's part of the trial; Harbor runs the tests and deletes the environment.

        Where the tests share the environment with the agent, whatever goes wrong from here on is a
        VERIFIER_ERROR, since the agent can have caused it. SandboxError if it does not answer now.
        """
        trial = self._require_trial()
        if not trial.refusal:
            answer = await self._exec('harbor_leave')
            if not answer.report and answer.exit_code not in _NO_BASH:
                raise SandboxError(
                    f'{self.task.task_id}: the environment is gone: {one_line(answer.text)}'
                )
        self._environment = None
        return await self._harbor('verify', trial.end(), None)

    async def stop(self) -> None:
        """Deletes the environment. Safe to call twice, or unstarted."""
        self._environment = None
        trial, self.trial = self.trial, None
        logs, self.logs = self.logs, None
        try:
            if trial is not None:
                await on_harbors_loop(trial.cancel(_STOP_SEC))
        finally:
            if logs is not None:
                logs.cleanup()

    # The rest is one sandbox's plumbing, from the outside in.

    def _running(self) -> bool:
        return self._environment is not None

    def _require_trial(self) -> Trial:
        self._require_running()
        assert self.trial is not None
        return self.trial

    async def restore_tests(self) -> None:
        """Harbor's own verifier leaves them as they are."""

    async def _put(self, directory: str, content: bytes) -> str:
        raise NotImplementedError  # `upload` is Harbor's

    async def _harbor(self, what: str, work: Coroutine, seconds: float | None) -> Any:
        """Harbor's answer; what it raises is a SandboxError, or a ValueError of the task."""
        try:
            async with asyncio.timeout(seconds):
                return await on_harbors_loop(work)
        except (ValueError, SandboxError):
            raise
        except Exception as error:  # each of thirty environments raises what its own SDK does
            raise SandboxError(
                f'{self.task.task_id}: Harbor cannot {what}: {one_line(error)}'
            ) from error

    async def _exec(
        self,
        name: str,
        *arguments: object,
        command: str = '',
        seconds: float = _SETUP_SEC,
        user: str | None = None,
    ) -> _Answer:
        """What a script printed up to its marked line. `command` is in base64; `user` None is the
        agent's."""
        script = read_script(name)
        if name in ('harbor_fresh', 'harbor_end'):
            script = read_script('harbor_kill') + script
        words = [self._folder, self._mark, *map(str, arguments)]
        work = self._environment.exec(
            _RUN + shlex.join(words),
            env={'ECHO_JAX_SCRIPT': script, 'ECHO_JAX_COMMAND': command},
            timeout_sec=math.ceil(seconds),
            user=user,
        )
        result = await self._harbor('exec', work, seconds + _SETUP_SEC)
        text = (result.stdout or '') + (result.stderr or '')
        lines: list[str] = str(result.stdout or '').splitlines()
        for last in range(len(lines) - 1, -1, -1):
            if lines[last].startswith(self._mark):
                report = lines[last].removeprefix(self._mark).strip()
                return _Answer(lines[:last], report, result.return_code, text)
        return _Answer([], '', result.return_code, text)

    async def _end_all(self) -> None:
        for _ in range(3):  # a fork bomb may leave no room for the first
            # By root, since the agent may have become another user.
            answer = await self._exec('harbor_end', self._spared, user='root')
            if answer.report == 'clear':
                self._spared = self._born
                return
        if not answer.report and answer.exit_code in _NO_BASH:
            return  # the agent removed it; no command of its own will run either
        raise SandboxError(
            f'{self.task.task_id}: the environment does not end its processes: '
            f'{one_line(answer.text)}'
        )

    async def _start_shell(self, line: str, nonce: str) -> None:
        if self._is_fresh:
            return
        armoured = _armoured(line.encode(errors='surrogateescape'))
        answer = await self._exec('harbor_open', command=armoured)
        if not answer.report.startswith(f'{nonce} 0 '):
            raise EOFError

    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        if self._is_fresh:
            name, line = 'harbor_fresh', command.encode(errors='surrogateescape')
        else:
            name, line = 'harbor_run', channels.command_lines(command, self._last_exit, nonce)
        armoured = _armoured(line)
        if len(armoured) > _MAX_COMMAND:
            self._output = (b'', b'bash: Argument list too long\n')
            return Ending.REPORTED, 126
        slice_sec = min(timeout, _SLICE_SEC)
        slices = math.ceil(timeout / slice_sec)
        answer = await self._exec(
            name,
            *(slices, slice_sec, shell.DISCARD_BYTES, self._output_bytes),
            command=armoured,
            seconds=timeout + _SETUP_SEC,
        )
        if not answer.report and answer.exit_code in _NO_BASH:  # the agent removed it, for example
            self._output = (b'', answer.text.encode())
            return Ending.REPORTED, answer.exit_code
        out, err = ['', '', *answer.lines][-2:]
        self._output = (b'', b'')
        try:
            self._output = (base64.b64decode(out), base64.b64decode(err))
            return self._ending(answer.report, nonce)
        except ValueError:  # the agent forged a report, or removed base64
            return Ending.LOST, shell.KILLED

    def _ending(self, report: str, nonce: str) -> tuple[Ending, int]:
        """How a command ended, by the report of harbor_run.sh or harbor_fresh.sh."""
        kind, _, rest = report.partition(' ')
        if kind == nonce:
            code, _, self._cwd = rest.partition(' ')
            return Ending.REPORTED, int(code)
        if kind == 'code':
            return Ending.REPORTED, int(rest)
        if kind == 'dead':  # `exit` and the like
            return Ending.DEAD, int(rest)
        if self._is_fresh and rest.isdigit():  # what was there before the command lives on
            self._spared = int(rest)
        if kind == 'timeout':
            return Ending.TIMEOUT, -1
        # Too much output, or the script was killed.
        return (Ending.FLOOD if kind == 'flood' else Ending.LOST), shell.KILLED

    def _take_output(self) -> tuple[bytes, bytes]:
        return self._output


def _armoured(line: bytes) -> str:
    return base64.b64encode(line).decode()
