"""A sandbox from Linux namespaces alone: no daemon, no image, tens of milliseconds to start.

The host system, read-only, is the image; what a task adds lies in memory (tmpfs) and goes with
the sandbox. It keeps honest work apart and dishonest work inside, on one kernel: if tasks come from
strangers, use the Docker sandbox with a hardened runtime. There is never a network, whatever
`Task.network` says.

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
import shlex
import signal
import subprocess
from collections.abc import Iterable

from echo_jax import types
from echo_jax.sandbox import SandboxError, channels, healthcheck
from echo_jax.sandbox import shell as shells
from echo_jax.sandbox.local import dockerfile, namespaces
from echo_jax.sandbox.local.context import Context
from echo_jax.sandbox.shell import Ending

_STARTUP_SEC = 20.0  # for what takes milliseconds, on a machine that may be overloaded
_MEMORY_MB = 1024  # of each process, if nobody names a limit
_MAX_STRAYS = 1_000  # messages of others on the report's socket, in one command


class LocalSandbox(shells.ShellSandbox):
    """One sandbox (docs/design.md#policy-and-sandbox). Start it once; after `stop` it is gone.

    `limits` are fields of `namespaces.Limits`; `memory_mb` is the task's if not given.
    `output_bytes` of each stream of a command are kept, from its start; the rest is discarded.
    """

    _init: int  # pidfd of the sandbox's process 1
    _requests: shells.Requests  # to it

    def __init__(
        self,
        task: types.Task,
        *,
        backend: str = 'auto',
        output_bytes: int = 1 << 20,
        shell: str = 'persistent',
        **limits: int,
    ):
        if backend not in ('auto', *namespaces.BACKENDS):
            raise ValueError(f"backend is {backend!r}; expected 'auto', 'bubblewrap' or 'unshare'")
        super().__init__(task, output_bytes, shell)
        if (task.agent_user, task.verifier_user) != (None, None):
            named = task.agent_user if task.agent_user is not None else task.verifier_user
            raise ValueError(
                f'{task.task_id} names the user {named!r}, but the local sandbox has one account; '
                "set sandbox.backend to 'docker'"
            )
        self._backend = backend
        limits.setdefault('memory_mb', task.memory_mb or _MEMORY_MB)
        if task.storage_mb is not None:
            limits.setdefault('disk_mb', task.storage_mb)
        self._limits = namespaces.Limits(**limits)
        self._env = dict(task.env)
        self._descriptors = contextlib.ExitStack()
        self._process: subprocess.Popen | None = None  # bwrap or unshare, on the host
        self._is_open = False
        self._shell_pid = 0
        self._out, self._err = bytearray(), bytearray()  # of the last command
        self._seen = self._strays = 0  # bytes and foreign reports of the last command

    async def start(self) -> None:
        """Opens the sandbox, follows the task's environment/Dockerfile, waits for its healthcheck.

        Raises SandboxError if namespaces are refused; ValueError for a Dockerfile that a local
        sandbox cannot follow, or of which a RUN fails.
        """
        environment = self.task.path / 'environment'
        read, context = dockerfile.Dockerfile((), '/app', {}), None
        if (environment / 'Dockerfile').exists():
            read = dockerfile.read_dockerfile(environment / 'Dockerfile')
            context = Context(environment)
            for step in read.steps:  # all are looked up before anything is opened
                if isinstance(step, dockerfile.Copy):
                    context.find(step)
        self._workdir = self.task.workdir or read.workdir
        self._env = read.env | self.task.env
        for name in self._env:
            if not re.fullmatch(r'[A-Za-z_]\w*', name, re.ASCII):
                raise ValueError(
                    f'{self.task.task_id}: {name!r} is no name for a variable; see env'
                )
        try:
            await self._open()
            if context:
                await self._follow(read, context)
            await self._make_directory(self._workdir)
            if self.task.docker_image and not context and environment.is_dir():
                await self.upload(environment, self._workdir)  # as Harbor does
            await self.reset()
            await healthcheck.wait(self.task, self.run_apart)
        except BaseException:  # cancelled or failed: nothing may stay behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends every process and frees all that was written. Safe to call twice, or unstarted."""
        process, self._process = self._process, None
        if process is None:  # none could be spawned, or it has ended before
            self._descriptors.close()
            return
        if self._is_open:
            with contextlib.suppress(ProcessLookupError):  # takes its whole namespace with it
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
        else:
            os.killpg(process.pid, signal.SIGKILL)  # bwrap alone would leave its child behind
        self._is_open = False
        self._close_shell()
        self._descriptors.close()
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
        try:
            with contextlib.ExitStack() as theirs:  # what the process has copies of, once it runs
                self._process = self._spawn(backend, theirs)
            await self._await_root(backend)
        except OSError as error:  # the machine has no room for a process or a descriptor
            raise SandboxError(f'{backend} opened no sandbox: {error}') from None

    def _spawn(self, backend: str, theirs: contextlib.ExitStack) -> subprocess.Popen:
        ours = self._descriptors
        control, self._control = channels.pipe(theirs, ours)
        script, self._script = channels.pipe(theirs, ours)
        self._stdout, stdout = channels.pipe(ours, theirs)
        self._stderr, stderr = channels.pipe(ours, theirs)
        self._replies, replies = channels.status_pair(ours, theirs)
        self._status, status = channels.status_pair(ours, theirs)
        for descriptor in (self._control, self._script, self._stdout, self._stderr):
            os.set_blocking(descriptor, False)
        channels.not_for_forks.add(self._control)
        ours.callback(channels.not_for_forks.discard, self._control)
        argv, environment = namespaces.command(backend, self._limits, (script, status, stdout))
        # vfork inside, so the size of this process does not matter; the session of its own keeps
        # the user's terminal and its Ctrl-C away.
        return subprocess.Popen(
            argv,
            stdin=control,
            stdout=replies,
            stderr=stderr,
            pass_fds=(script, status, stdout),
            env=environment,
            start_new_session=True,
        )

    async def _await_root(self, backend: str) -> None:
        try:
            async with asyncio.timeout(_STARTUP_SEC):
                message, pid = await channels.receive(self._replies)
        except TimeoutError:
            message, pid = b'', 0
        if message != b'ready\n':
            lines = channels.available(self._stderr).decode(errors='replace').splitlines()
            raise SandboxError(f'{backend} opened no sandbox: {"; ".join(lines) or "no answer"}')
        self._requests = shells.Requests(
            functools.partial(channels.write, self._control),
            functools.partial(channels.receive_line, self._replies),
        )
        self._init = os.pidfd_open(pid)
        self._descriptors.callback(os.close, self._init)
        self._is_open = True
        # The first that an out-of-memory kernel kills. With CAP_SYS_RESOURCE here, that is final.
        pathlib.Path(f'/proc/{pid}/oom_score_adj').write_text('1000')

    async def _follow(self, read: dockerfile.Dockerfile, context: Context) -> None:
        """Does what the Dockerfile asks for, in the task's time for a build."""
        steps, loop = read.steps, asyncio.get_running_loop()
        deadline = loop.time() + self.task.build_timeout_sec
        directories = [step.path for step in steps if isinstance(step, dockerfile.Directory)]
        in_usr = any(path.startswith('/usr/') for path in (*directories, self._workdir))
        if len(directories) == len(steps) and not in_usr:  # no root that can be written is needed
            for path in directories:
                await self._make_directory(path)
            return
        await self._request('build_begin', '\n'.join(_system_directories(steps, self._workdir)))
        for step in steps:
            if isinstance(step, dockerfile.Run):
                await self._build(step, deadline - loop.time())
            elif isinstance(step, dockerfile.Copy):
                await self._copy(step, context)
            else:
                await self._make_directory(step.path)
        await self._make_directory(self._workdir)
        await self._request('build_end', self._workdir)

    async def _build(self, run: dockerfile.Run, timeout: float) -> None:
        """Follows one RUN, in a shell of its own."""
        for directory in run.empty:
            await self._request('mount_empty', directory)
        async with self._lock:
            await self._kill()
        exports = ''.join(f'export {k}={channels.quote(v)};' for k, v in run.env.items())
        words = ' '.join(map(channels.quote, run.argv))
        command = f'cd -- {channels.quote(run.workdir)} && {{ {exports}exec {words}; }}'
        env, self._env = self._env, {}
        result = await self._run(f'({command})', max(timeout, 0.0))
        async with self._lock:
            await self._kill()
        self._env, self._cwd = env, ''
        for directory in run.empty:
            await self._request('unmount_empty', directory)
        if result.timed_out:
            seconds = self.task.build_timeout_sec
            raise SandboxError(f'{run.where}: RUN did not end in the {seconds:g} s of the build')
        if result.exit_code != 0:
            tail = '; '.join((result.stderr or result.stdout).strip().splitlines())[-500:]
            raise ValueError(
                f'{run.where}: RUN {shlex.join(run.argv)[-200:]!r} ended with {result.exit_code} '
                f'in the local sandbox (no root, no network, the system of this machine): {tail}'
            )

    async def _copy(self, copy: dockerfile.Copy, context: Context) -> None:
        target = _real(copy.target)
        into = target.endswith('/') or (await self._ask('is_directory', target) == 'done')
        content = context.archive(copy._replace(target=target), into)
        async with self._lock:
            reply = await self._requests.ask(f'copy {len(content)}', content)
        if reply != 'done':
            reason = reply.removeprefix('error ')
            raise ValueError(f'{copy.where}: cannot copy to {copy.target}: {reason}')

    async def _ask(self, request: str, path: str) -> str:
        async with self._lock:
            return await self._requests.ask(f'{request} 0 {channels.escape(path)}')

    async def _request(self, request: str, path: str) -> None:
        reply = await self._ask(request, path)
        if reply != 'done':
            raise SandboxError(f'{self.task.task_id}: {reply.removeprefix("error ")}')

    async def _make_directory(self, path: str) -> None:
        if path == '/app':  # which is there
            return
        async with self._lock:
            reply = await self._put(_real(path), channels.EMPTY_ARCHIVE)
        if reply != 'done':
            raise ValueError(f'cannot make the directory {path}: {reply.removeprefix("error ")}')

    def _running(self) -> bool:
        return self._is_open

    async def restore_tests(self) -> None:
        await self._request('restore_tests', '/tests')

    async def _put(self, directory: str, content: bytes) -> str:
        return await self._requests.put(directory, content)

    async def _end_all(self) -> None:
        await self._requests.ask('kill')
        self._take_output()  # what is left in the pipes is the last command's

    async def _start_shell(self, line: str, nonce: str) -> None:
        channels.discard(self._status)
        await channels.write(self._control, b'shell\n')
        await channels.write(self._script, line.encode(errors='surrogateescape'))
        message = b''
        while not message.startswith(nonce.encode()):  # of what an older shell left behind
            message, self._shell_pid = await channels.receive(self._status)
        self._shell = os.pidfd_open(self._shell_pid)
        self._of_shell.callback(os.close, self._shell)

    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()  # (Ending, exit code)
        self._out, self._err = bytearray(), bytearray()
        self._seen = self._strays = 0
        on_output = functools.partial(self._on_output, nonce, ended)
        watched = {
            self._status.fileno(): functools.partial(self._on_report, nonce, ended),
            self._shell: functools.partial(_settle, ended, Ending.DEAD, 0),
            self._stdout: functools.partial(on_output, self._stdout, self._out),
            self._stderr: functools.partial(on_output, self._stderr, self._err),
        }
        for descriptor, callback in watched.items():
            loop.add_reader(descriptor, callback)
        try:
            async with asyncio.timeout(timeout):
                lines = channels.command_lines(command, self._last_exit, nonce)
                await channels.write(self._script, lines)
                ending, exit_code = await ended
        except TimeoutError:
            return Ending.TIMEOUT, -1
        except BrokenPipeError:
            raise SandboxError('the sandbox died') from None
        finally:
            for descriptor in watched:
                loop.remove_reader(descriptor)
        if ending is Ending.DEAD:
            exit_code = int(await self._requests.ask('wait'))
        return ending, exit_code

    def _on_report(self, nonce: str, ended: asyncio.Future) -> None:
        message, pid = channels.receive_now(self._status)
        report = re.fullmatch(rb'%b (\d{1,3}) (.*)\n' % nonce.encode(), message)
        if report and pid == self._shell_pid:
            self._cwd = report[2].decode(errors='surrogateescape')
            _settle(ended, Ending.REPORTED, int(report[1]))
        self._strays += 1
        if self._strays > _MAX_STRAYS:
            _settle(ended, Ending.FLOOD, shells.KILLED)

    def _on_output(
        self, nonce: str, ended: asyncio.Future, descriptor: int, kept: bytearray
    ) -> None:
        chunk = os.read(descriptor, 1 << 16)
        self._seen += len(chunk)
        # A command that closes every descriptor takes the report's socket away; bash then writes
        # the report to what is left. It counts, but that shell can serve no longer.
        report = re.search(rb'%b (\d{1,3}) .*\n' % nonce.encode(), chunk)
        if report:
            _settle(ended, Ending.LOST, int(report[1]))
            chunk = chunk[: report.start()] + chunk[report.end() :]
        kept += chunk[: max(self._output_bytes - len(kept), 0)]
        if self._seen > shells.DISCARD_BYTES:
            _settle(ended, Ending.FLOOD, shells.KILLED)

    def _take_output(self) -> tuple[bytes, bytes]:
        self._out += channels.available(self._stdout)
        self._err += channels.available(self._stderr)
        return bytes(self._out), bytes(self._err)


# Directories of /usr that a RUN may write to, as far as the host has them.
_OPEN_IN_USR = [
    f'/usr/{name}' for name in ('bin', 'include', 'lib', 'local', 'sbin', 'share', 'src')
]
_OPEN_IN_USR += [f'/usr/local/{name}' for name in ('bin', 'etc', 'include', 'lib', 'sbin', 'share')]


def _system_directories(steps: Iterable[dockerfile.Step], workdir: str) -> list[str]:
    """The directories of /usr that must be open while the Dockerfile is followed: none if it runs
    no command and copies nothing there.
    """
    targets = [step.target for step in steps if isinstance(step, dockerfile.Copy)]
    targets += [step.path for step in steps if isinstance(step, dockerfile.Directory)]
    anywhere = '/' in targets or any(isinstance(step, dockerfile.Run) for step in steps)
    found = set(_OPEN_IN_USR if anywhere else ())
    for target in map(_real, (*targets, workdir)):
        inside = [
            str(p) for p in (pathlib.PurePosixPath(target), *pathlib.PurePosixPath(target).parents)
        ]
        found |= {path for path in inside if path.startswith('/usr/')}
    return sorted(found)


def _real(path: str) -> str:
    """`path`, which is absolute, with the sandbox's own links resolved, such as /bin."""
    for link, target in namespaces.links().items():
        if path == link or path.startswith(link + '/'):
            return '/' + target.lstrip('/') + path[len(link) :]
    return path


@functools.cache
def _working_backend(backend: str, path: str) -> str:
    """`check`, once for each PATH, so that not every episode pays for it."""
    return namespaces.check(backend)


def _settle(future: asyncio.Future, ending: Ending, exit_code: int) -> None:
    if not future.done():
        future.set_result((ending, exit_code))
