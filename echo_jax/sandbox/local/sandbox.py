"""A sandbox from Linux namespaces alone: no daemon, no image, tens of milliseconds to start.

The host system, read-only, is the image; what a task adds lies in memory (tmpfs) and goes with
the sandbox. It keeps honest work apart and dishonest work inside, on one kernel: use `docker.py`
with a hardened runtime where tasks come from strangers. There is never a network, whatever
`Task.allow_internet` says.

The shell. One bash runs every command, so `cd`, variables and functions last. It reads the command
as one quoted line and reports the exit code on a socket that tells us the sender's process id,
with a number drawn for that command: no other process can report for it, nor an earlier command
for a later one. Standard input is /dev/null. Background output that is still coming
when a command ends shows with the next command, as in a terminal.

When a shell does not survive. `exit`, `exec`, `kill -9 $$` and the like end it: the exit code is
the shell's own, and its background processes live on. A timeout or endless output (exit code 137)
kills every process in the sandbox. In both cases the next command gets a fresh shell in the last
known directory, with the task's variables; its own variables, functions and options are gone.
"""

import asyncio
import contextlib
import functools
import os
import pathlib
import re
import secrets
import signal
import subprocess

from echo_jax import types
from echo_jax.sandbox import CommandResult, SandboxError, channels, shell
from echo_jax.sandbox.local import dockerfile, namespaces
from echo_jax.sandbox.local.namespaces import check

_STARTUP_SEC = 20.0  # for what takes milliseconds, on a machine that may be overloaded
_DISCARD_BYTES = 64 << 20  # output beyond this ends the command; up to it, it is only not kept
_MAX_STRAYS = 1_000  # messages of others on the report's socket, in one command
_KILLED = 128 + signal.SIGKILL


class LocalSandbox(shell.ShellSandbox):
    """One sandbox (DESIGN 3.7). Start it once; after `stop` it is gone for good.

    `memory_mb` (default: the task's) bounds each process, `disk_mb` all that is written, wherever.
    `output_bytes` of each stream of a command are kept, from its start; the rest is discarded.
    """

    def __init__(
        self,
        task: types.Task,
        *,
        backend: str = 'auto',
        processes: int = 256,
        memory_mb: int | None = None,
        disk_mb: int = 256,
        files: int = 65_536,
        cpu_seconds: int = 3_600,
        open_files: int = 1_024,
        output_bytes: int = 1 << 20,
    ):
        if backend not in ('auto', *namespaces.BACKENDS):
            raise ValueError(f"backend {backend!r}: want 'auto', 'bubblewrap' or 'unshare'")
        super().__init__(output_bytes)
        self.task = task
        self._backend = backend
        memory_mb = task.memory_mb if memory_mb is None else memory_mb
        self._limits = namespaces.Limits(
            processes, memory_mb, disk_mb, files, cpu_seconds, open_files
        )
        self._workdir, self._env = task.workdir, dict(task.env)
        self._descriptors = contextlib.ExitStack()
        self._process: subprocess.Popen | None = None  # bwrap or unshare, on the host
        self._init: int | None = None  # pidfd of the sandbox's process 1
        self._shell_pid = 0  # `_shell` is its pidfd

    async def start(self) -> None:
        """Opens the sandbox and follows the task's environment/Dockerfile.

        Raises SandboxError where namespaces are refused or a RUN fails; ValueError for a Dockerfile
        that a local sandbox cannot follow.
        """
        environment = self.task.path / 'environment'
        recipe = dockerfile.Recipe((), None, self._env)
        if (environment / 'Dockerfile').exists():
            recipe = dockerfile.read_dockerfile(
                environment / 'Dockerfile', self.task.workdir, self.task.env
            )
        if recipe.workdir and self.task.workdir == types.Task.workdir:  # the task names none
            self._workdir = recipe.workdir
        self._env = recipe.env | self.task.env
        for name in self._env:
            if not re.fullmatch(r'[A-Za-z_]\w*', name, re.ASCII):
                raise ValueError(
                    f'{self.task.task_id}: {name!r} is no name for a variable; see env'
                )
        copies = [  # all are looked up before anything is opened
            dockerfile.copy_sources(step, environment) if step.name == 'COPY' else None
            for step in recipe.steps
        ]
        try:
            await self._open()
            if self._workdir != types.Task.workdir:  # which is there
                await self._make_directory(self._workdir)
            for step, pairs in zip(recipe.steps, copies, strict=True):
                if pairs is None:
                    await self._build(step)
                else:
                    for path, target in pairs:
                        await self.upload(path, target)
            await self.reset()
        except BaseException:  # cancelled or failed: nothing may stay behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends every process and frees all that was written. Safe to call twice, or unstarted."""
        process, self._process = self._process, None
        if process is None:
            return
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):  # takes its whole namespace with it
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)  # bwrap alone would leave its child behind
        self._close_shell()
        self._descriptors.close()
        self._init = None
        ended = os.pidfd_open(process.pid)
        try:
            async with asyncio.timeout(_STARTUP_SEC):
                await channels.ready(ended)
        except TimeoutError:
            process.kill()
        finally:
            os.close(ended)
            if process.poll() is None:
                process.kill()
                process.wait()

    # The rest is one sandbox's plumbing, from the outside in.

    async def _open(self) -> None:
        """Spawns process 1 and waits until it has built the root."""
        backend = _working_backend(self._backend, os.environ.get('PATH', ''))
        control, self._control = channels.pipe()
        script, self._script = channels.pipe()
        self._stdout, stdout = channels.pipe()
        self._stderr, stderr = channels.pipe()
        self._replies, replies = channels.status_pair()
        self._status, status = channels.status_pair()
        argv, environment = namespaces.command(backend, self._limits, (script, status, stdout))
        theirs = (control, script, stdout, stderr, replies, status)
        for descriptor in (self._control, self._script, self._stdout, self._stderr):
            os.set_blocking(descriptor, False)
            self._descriptors.callback(os.close, descriptor)
        channels.not_for_forks.add(self._control)
        self._descriptors.callback(channels.not_for_forks.discard, self._control)
        self._descriptors.callback(self._replies.close)
        self._descriptors.callback(self._status.close)
        try:
            # vfork inside, so the size of this process does not matter; the session of its own
            # keeps the user's terminal and its Ctrl-C away.
            self._process = subprocess.Popen(
                argv,
                stdin=control,
                stdout=replies,
                stderr=stderr,
                pass_fds=(script, status, stdout),
                env=environment,
                start_new_session=True,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        try:
            async with asyncio.timeout(_STARTUP_SEC):
                message, pid = await channels.receive(self._replies)
        except TimeoutError:
            message, pid = b'', 0
        if message != b'ready\n':
            lines = channels.available(self._stderr).decode(errors='replace').splitlines()
            raise SandboxError(f'{backend} opened no sandbox: {"; ".join(lines) or "no answer"}')
        self._requests = shell.Requests(
            functools.partial(channels.write, self._control),
            functools.partial(channels.receive_line, self._replies),
        )
        self._init = os.pidfd_open(pid)
        self._descriptors.callback(os.close, self._init)
        # The first that an out-of-memory kernel kills. With CAP_SYS_RESOURCE here, that is final.
        pathlib.Path(f'/proc/{pid}/oom_score_adj').write_text('1000')

    async def _build(self, step: dockerfile.Step) -> None:
        """One RUN of the Dockerfile, in a shell of its own."""
        self._env, env = step.env, self._env
        self._cwd = channels.quote(step.workdir)
        await self._make_directory(step.workdir)
        async with self._lock:
            await self._kill()
        result = await self.run(step.arguments[0], self.task.build_timeout_sec)
        self._env, self._cwd = env, ''
        if result.exit_code != 0:
            tail = (result.stderr or result.stdout).strip().replace('\n', '; ')[-500:]
            raise SandboxError(
                f'{self.task.task_id}: RUN {step.arguments[0]!r} ended with {result.exit_code} in '
                f'the local sandbox (no network, read-only system): {tail}'
            )

    async def _make_directory(self, path: str) -> None:
        async with self._lock:
            await self._put(path, channels.EMPTY_ARCHIVE)

    def _running(self) -> bool:
        return self._init is not None

    async def _end_all(self) -> None:
        await self._requests.ask('kill')
        self._close_shell()
        channels.available(self._stdout)
        channels.available(self._stderr)

    def _close_shell(self) -> None:
        if self._shell is not None:
            os.close(self._shell)
        self._shell = None

    async def _open_shell(self) -> None:
        for attempt in (1, 2):
            channels.discard(self._status)
            nonce = secrets.token_hex(8)
            exports = ''.join(f'export {k}={channels.quote(v)};' for k, v in self._env.items())
            workdir = channels.quote(self._workdir)
            line = f'cd -- {self._cwd or workdir} || cd -- {workdir};unset OLDPWD;{exports}'
            line += f'{channels.report(nonce)}\n'
            await channels.write(self._control, b'shell\n')
            await channels.write(self._script, line.encode(errors='surrogateescape'))
            try:
                async with asyncio.timeout(_STARTUP_SEC):
                    self._shell_pid = await self._first_report(nonce)
                self._shell = os.pidfd_open(self._shell_pid)
                return
            except (TimeoutError, ProcessLookupError):  # a fork bomb, perhaps: clear and try again
                if attempt == 2:
                    raise SandboxError('no shell starts in the sandbox') from None
                await self._kill()

    async def _first_report(self, nonce: str) -> int:
        """The new shell's process id; reports of what an older shell left behind are dropped."""
        while True:
            message, pid = await channels.receive(self._status)
            if message.startswith(nonce.encode()):
                return pid

    async def _run(self, command: str, timeout: float) -> CommandResult:
        loop, nonce = asyncio.get_running_loop(), secrets.token_hex(8)
        ended = loop.create_future()  # how it ended: (kind, exit code)
        out, err = bytearray(), bytearray()
        self._seen = self._strays = 0
        watched = {
            self._status.fileno(): functools.partial(self._on_report, nonce, ended),
            self._shell: functools.partial(_settle, ended, 'dead', 0),
            self._stdout: functools.partial(self._on_output, self._stdout, out, nonce, ended),
            self._stderr: functools.partial(self._on_output, self._stderr, err, nonce, ended),
        }
        for descriptor, callback in watched.items():
            loop.add_reader(descriptor, callback)
        try:
            async with asyncio.timeout(timeout):
                await channels.write(self._script, channels.script(command, self._last_exit, nonce))
                kind, exit_code = await ended
        except TimeoutError:
            kind, exit_code = 'timeout', -1
        except BrokenPipeError:
            raise SandboxError('the sandbox died') from None
        finally:
            for descriptor in watched:
                loop.remove_reader(descriptor)
        if kind == 'dead':
            exit_code = int(await self._requests.ask('wait'))
            self._close_shell()
        elif kind != 'reported':
            await self._requests.ask('kill')
            self._close_shell()
        out += channels.available(self._stdout)
        err += channels.available(self._stderr)
        self._last_exit = exit_code if kind == 'reported' else 0
        limit = self._output_bytes
        texts = (bytes(stream[:limit]).decode(errors='replace') for stream in (out, err))
        return CommandResult(*texts, exit_code, kind == 'timeout')

    def _on_report(self, nonce: str, ended: asyncio.Future) -> None:
        message, pid = channels.receive_now(self._status)
        report = re.fullmatch(rb'%b (\d+) (.*)\n' % nonce.encode(), message)
        if report and pid == self._shell_pid:
            self._cwd = report[2].decode(errors='surrogateescape')
            _settle(ended, 'reported', int(report[1]))
        self._strays += 1
        if self._strays > _MAX_STRAYS:
            _settle(ended, 'flood', _KILLED)

    def _on_output(self, descriptor: int, kept: bytearray, nonce: str, ended: asyncio.Future):
        chunk = os.read(descriptor, 1 << 16)
        self._seen += len(chunk)
        # A command that closes every descriptor takes the report's socket away; bash then writes
        # the report to what is left. It counts, but that shell can serve no longer.
        report = re.search(rb'%b (\d+) .*\n' % nonce.encode(), chunk)
        if report:
            _settle(ended, 'lost', int(report[1]))
            chunk = chunk[: report.start()] + chunk[report.end() :]
        kept += chunk[: max(self._output_bytes - len(kept), 0)]
        if self._seen > _DISCARD_BYTES:
            _settle(ended, 'flood', _KILLED)


@functools.cache
def _working_backend(backend: str, path: str) -> str:
    """`check`, once for each PATH: an episode should not pay for it again."""
    return check(backend)


def _settle(future: asyncio.Future, kind: str, exit_code: int) -> None:
    if not future.done():
        future.set_result((kind, exit_code))
