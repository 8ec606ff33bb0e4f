"""What the sandboxes have in common: one shell, one thing at a time, and the ways a command ends.

A backend says how a shell is opened, how one command runs in it, how an archive is unpacked inside,
and how what runs inside is ended; see `local/`, `docker/` and `harbor/`.
"""

import abc
import asyncio
import contextlib
import enum
import pathlib
import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping

from echo_jax.sandbox import CommandResult, SandboxError, Verdict, channels, verifier
from echo_jax.types import Task

DISCARD_BYTES = 64 << 20  # output beyond this ends the command; up to it, it is only not kept
KILLED = 128 + signal.SIGKILL  # bash's exit code
SHELLS = ('persistent', 'fresh')
_REPLY_SEC = 20.0  # for what takes milliseconds, on a machine that may be overloaded
# No shell can hold such a command. Bash would put it like this.
_NUL_RESULT = CommandResult('', 'bash: line 1: command holds a NUL byte\n', 2, False)
# An agent that removed bash has a shell no more, as in Harbor, and its reward.
_NO_SHELL_RESULT = CommandResult(
    '', 'bash: cannot be started in the sandbox any more\n', 126, False
)


class NoShell(SandboxError):
    """No shell starts in a sandbox that answers otherwise: the agent may have removed it."""


class Ending(enum.Enum):
    """How a command ended. After all but REPORTED and DEAD, what it started is killed, and in some
    sandboxes all that the agent did (docs/protocol.md#shell).
    """

    REPORTED = enum.auto()  # the shell told the exit code and goes on
    DEAD = enum.auto()  # the shell ended with the command (`exit`); its background lives on
    TIMEOUT = enum.auto()
    FLOOD = enum.auto()  # more than DISCARD_BYTES of output
    FULL = enum.auto()  # more than `disk_mb` written
    LOST = enum.auto()  # no report came, or not on its own channel: the command spoiled that


class ShellSandbox(abc.ABC):
    """A sandbox (docs/design.md#policy-and-sandbox) but for what a backend does its own way.

    `output_bytes` of each stream of a command are kept, from its start. `shell` is 'persistent',
    one shell for all commands, so that `cd` and variables last, or 'fresh', a `bash -c` in the
    working directory for each (docs/protocol.md#shell).
    """

    startup_sec = 20.0  # for a shell to open, which takes milliseconds unless all is overloaded
    agent_owns_bash = False  # whether the agent may write to what a shell starts from

    def __init__(self, task: Task, output_bytes: int, shell: str = 'persistent'):
        if shell not in SHELLS:
            raise ValueError(f"sandbox.shell is {shell!r}; expected 'persistent' or 'fresh'")
        if task.needs_harbor:
            raise ValueError(
                f'{task.task_id} needs {", ".join(task.needs_harbor)}, which only '
                "sandbox.backend = 'harbor' has"
            )
        self.task = task
        self._output_bytes = output_bytes
        self._is_fresh = shell == 'fresh'
        self._workdir = task.workdir or '/app'
        self._env: dict[str, str] = {}  # what a new shell exports
        self._lock = asyncio.Lock()  # one command or request at a time
        self._shell_is_open = False
        self._of_shell = contextlib.ExitStack()  # what is closed with the shell
        self._cwd = ''  # of the shell, quoted for bash; empty is the workdir
        self._last_exit = 0
        self._unclean = False  # a command was cancelled: kill before the next

    async def run(self, command: str, timeout: float) -> CommandResult:
        """Runs the agent's `command`; `timeout` in seconds. The backend says what outlives what.

        Raises SandboxError if the sandbox does not run, died or hangs, as all methods do.
        """
        if self._is_fresh:
            return await self.run_apart(command, timeout)
        return await self._run(command, timeout)

    async def run_apart(
        self, command: str, timeout: float, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        """Runs `command` in a `bash -c` of its own in the working directory, with `env` on top.

        It changes nothing in the shell that starts it.
        """
        return await self.run_script(f'exec bash -c {channels.quote(command)}', timeout, env)

    async def run_script(
        self, script: str, timeout: float, env: Mapping[str, str] | None = None
    ) -> CommandResult:
        """Runs a script of ours in a subshell in the working directory, with `env` on top.

        That saves the milliseconds in which another bash starts, but the script sees what the
        agent has made of the shell, unless that is fresh.
        """
        exports = ''.join(f'export {k}={channels.quote(v)};' for k, v in (env or {}).items())
        place = channels.quote(self._workdir)
        return await self._run(f'(cd -- {place} && {{ {exports}{script}\n}})', timeout)

    async def _run(self, command: str, timeout: float) -> CommandResult:
        self._require_running()
        if '\0' in command:
            return _NUL_RESULT
        async with self._lock:
            if self._unclean:
                await self._kill()
            if not self._shell_is_open:
                try:
                    await self._open_shell()
                except NoShell:
                    return _NO_SHELL_RESULT
            self._unclean = True  # until we know how it ended
            ending, exit_code = await self._execute(command, secrets.token_hex(8), timeout)
            if ending is Ending.DEAD:
                self._close_shell()
            elif ending is not Ending.REPORTED:
                await self._kill()
            self._unclean = False
            self._last_exit = exit_code if ending is Ending.REPORTED else 0
            streams = self._take_output()
        stdout, stderr = (
            stream[: self._output_bytes].decode(errors='replace') for stream in streams
        )
        if ending is Ending.FULL:
            stderr += 'sandbox: disk limit exceeded\n'
        return CommandResult(stdout, stderr, exit_code, ending is Ending.TIMEOUT)

    async def solve(self) -> CommandResult:
        """Runs the task's own solution, by its first line, in the agent's time.

        Raises ValueError if there is none.
        """
        script = self.task.path / 'solution' / 'solve.sh'
        if not script.is_file():
            raise ValueError(f'{script} is missing; the oracle runs it')
        await self.upload(script.parent, '/solution')
        env = {'DEBIAN_FRONTEND': 'noninteractive'} | self.task.solution_env
        run = '[ -x /solution/solve.sh ] || chmod +x /solution/solve.sh; (/solution/solve.sh)'
        return await self.run_apart(run, self.task.agent_timeout_sec, env)

    async def verify(self) -> Verdict:
        """Ends the agent's processes, runs the task's tests, and reads the reward."""
        try:
            return await verifier.verify(self)
        except NoShell as error:
            return verifier.no_reward(str(error))

    async def upload(self, path: pathlib.Path, target: str) -> None:
        """Copies a file to the path `target`, or a directory's content into the directory `target`.

        Makes directories on the way; all belongs to the sandbox's user and is readable. Raises
        ValueError for a link that leads outside `path`, SandboxError if it cannot be written.
        """
        directory, content = channels.packed(path, target)
        self._require_running()
        async with self._lock:
            reply = await self._put(directory, content)
        if reply != 'done':
            raise SandboxError(f'cannot upload {path} to {target}: {reply.removeprefix("error ")}')

    async def reset(self) -> None:
        """Kills what `_end_all` does and opens a fresh shell in the task's workdir."""
        self._require_running()
        async with self._lock:
            await self._kill()
            self._cwd = ''
            await self._open_shell()

    async def _open_shell(self) -> None:
        """Opens a new shell in `_cwd`. Tries twice: a fork bomb may leave no room for the first.

        Raises NoShell if none starts although the sandbox answers and the agent can have caused it.
        """
        for _ in range(2):
            nonce = secrets.token_hex(8)
            line = channels.first_line(nonce, self._cwd, self._workdir, self._env)
            try:
                async with asyncio.timeout(self.startup_sec):
                    await self._start_shell(line, nonce)
                self._shell_is_open, self._last_exit = True, 0
                return
            except (EOFError, ConnectionError, TimeoutError, ProcessLookupError):
                self._close_shell()
                await self._kill()  # which fails if the sandbox does not answer
        kind = NoShell if self.agent_owns_bash else SandboxError
        raise kind(f'{self.task.task_id}: no shell starts in the sandbox')

    def _close_shell(self) -> None:
        self._of_shell.close()
        self._shell_is_open = False

    async def _kill(self) -> None:
        """Ends the shell, and with it what `_end_all` does."""
        self._unclean = True
        await self._end_all()
        self._close_shell()
        self._unclean = False

    def _require_running(self) -> None:
        if not self._running():
            raise SandboxError('the sandbox is not running; call start() first')

    @abc.abstractmethod
    def _running(self) -> bool:
        """Whether it was started and not stopped."""

    @abc.abstractmethod
    async def _start_shell(self, line: str, nonce: str) -> None:
        """Starts a shell, gives it `line`, and waits for the report that begins with `nonce`.

        Leaves in `_of_shell` how the shell is closed. EOFError, ConnectionError, TimeoutError or
        ProcessLookupError if it does not start.
        """

    @abc.abstractmethod
    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        """Runs `command` in the open shell: how it ended, and its exit code. Sets `_cwd`."""

    @abc.abstractmethod
    def _take_output(self) -> tuple[bytes, bytes]:
        """What the last command wrote to stdout and to stderr, at least `output_bytes` of each."""

    @abc.abstractmethod
    async def _end_all(self) -> None:
        """Kills the shell and what its last command started, or every process of the agent's; which
        of the two, docs/protocol.md#shell says.
        """

    @abc.abstractmethod
    async def restore_tests(self) -> None:
        """Puts back what the task's environment itself has in /tests, which is empty."""

    @abc.abstractmethod
    async def _put(self, directory: str, content: bytes) -> str:
        """Unpacks a tar archive into a directory inside; 'done', or what went wrong."""


class Requests:
    """Requests to a sandbox's process 1, one at a time; each has one line for an answer."""

    def __init__(
        self, write: Callable[[bytes], Awaitable], read_line: Callable[[], Awaitable[str]]
    ):
        self._write, self._read_line = write, read_line
        self._pending = ''  # the request that has yet to be answered

    async def ask(self, line: str, payload: bytes = b'') -> str:
        """Sends `line`, which has no newline, and then `payload`."""
        if self._pending:
            raise SandboxError(f'the request {self._pending} was interrupted; open a new sandbox')
        self._pending = line.split()[0]
        try:
            async with asyncio.timeout(_REPLY_SEC):
                await self._write(line.encode() + b'\n' + payload)
                reply = await self._read_line()
        except (EOFError, ConnectionError, TimeoutError):
            raise SandboxError(
                f'the sandbox or its engine died or hangs (request {self._pending})'
            ) from None
        self._pending = ''
        return reply

    async def put(self, directory: str, content: bytes) -> str:
        """Unpacks a tar archive into a directory of the sandbox; 'done', or what went wrong."""
        return await self.ask(f'put {len(content)} {channels.escape(directory)}', content)
