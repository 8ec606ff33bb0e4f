"""A sandbox that is a container of a Docker engine, with the task's own image.

The agent and the verifier are one user without any capability. A user that is not root has a
read-only system, and directories of its own in memory (tmpfs of bounded size, `images.py`), so that
nothing it can write reaches a disk; what the image holds there is copied for each sandbox. Root
(`Images(user=0)`), for tasks that install packages, may write anywhere in the container's layer,
and replace what the verifier runs. One file is bounded there; the sum is only looked at, every
second or so of commands, and what wrote too much is killed: a fast writer passes the bound by what
a disk takes in a second, what writes between two commands is found at the next, and the number of
files is not bounded. One kernel serves all: give `runtime` where tasks come from strangers.

Process 1 is a bash that kills, and moves files, on requests over the container's own streams. It is
the agent's user, but its file cannot be read, so the kernel keeps all others from tracing it or
opening its descriptors; as process 1 it is safe from `kill -9 -1`, it needs no new process to kill
all others, and it reaps what they leave. When its requests end it ends, the container with it, and
the engine removes that: so a worker that is killed leaves nothing.

The shell is an exec that behaves as in `local.py`, with the same lines and the same words. Reports
come within its streams, with a number drawn for each command, stdout's and stderr's after all that
was written before. One difference: background processes of a shell that ended live on, but nobody
reads what they print.
"""

import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable

import docker

from echo_jax.sandbox import CommandResult, SandboxError, channels, shell
from echo_jax.sandbox.docker import containers, engine
from echo_jax.sandbox.docker.images import HOME, Image, Images
from echo_jax.types import Task

log = logging.getLogger(__name__)

_STARTUP_SEC = 60.0  # for what takes a second, with hundreds of others at once
_LOOK_SEC = (0.5, 5.0)  # first and longest pause between looks after a command that runs on
_REPORT_SEC = 2.0  # between a report's two parts, on a machine that may be overloaded
_LOOK_AT_DISK_SEC = 1.0  # at least, between looks at what was written
_DISCARD_BYTES = 64 << 20  # output beyond this ends the command; up to it, it is only not kept
_REPORT_BYTES = 16 << 10  # no report is longer
_KILLED = 137
_REPORT = re.compile(rb'(?:(\d+) ([^\n]*))?\n')  # after its mark: stdout's, or stderr's end of line

# The shell by the name that its messages have; never by a PATH, which the agent may write to.
_SHELL = [f'{HOME}/bash', '-pc', f'unset BASH_ENV; exec -a bash {HOME}/bash --norc --noprofile -s']


class DockerSandbox(shell.ShellSandbox):
    """One sandbox (DESIGN 3.7). Start it once; after `stop` it is gone for good.

    `memory_mb` (default: the task's) bounds all processes together, `disk_mb` each directory that
    may be written, and one file; what lies in memory counts there, with `disk_mb` on top.
    `output_bytes` of each stream of a command are kept, from its start; the rest is discarded.
    """

    def __init__(
        self,
        task: Task,
        *,
        images: Images,
        processes: int = 256,
        memory_mb: int | None = None,
        disk_mb: int = 1024,
        files: int = 65_536,
        open_files: int = 1_024,
        output_bytes: int = 1 << 20,
        runtime: str | None = None,
    ):
        super().__init__(output_bytes)
        self.task = task
        self._images, self._engine = images, images.engine
        memory_mb = task.memory_mb if memory_mb is None else memory_mb
        self._limits = containers.Limits(processes, memory_mb, disk_mb, files, open_files)
        self._runtime = runtime
        self._name = f'echo_jax-{secrets.token_hex(8)}'
        self._creating: asyncio.Future | None = None
        self._control: engine.Streams | None = None  # of process 1; None unless it runs
        self._exec = ''  # the engine's name of the shell; `_shell` is its Streams
        self._unread = (b'', b'')  # of the last command's background, after its report
        self._looked = 0.0  # at what was written; time.monotonic()

    async def start(self) -> None:
        """Makes the image if need be, and the container. Raises as `Images.image`."""
        try:
            image = await self._images.image(self.task)
            self._workdir, self._bash_env = image.workdir, image.env.get('BASH_ENV')
            self._creating = asyncio.wrap_future(self._engine.submit(self._create, image))
            self._control = await engine.Streams.open(await asyncio.shield(self._creating))
            self._requests = shell.Requests(self._control.write, self._control.read_line)
            async with asyncio.timeout(_STARTUP_SEC):
                line = await self._control.read_line()
            if line != 'ready':
                raise SandboxError(f'{self.task.task_id}: {line}')
            async with self._lock:
                await self._open_shell()
        except (EOFError, TimeoutError):
            await self.stop()
            raise SandboxError(f'{self.task.task_id}: the container does not start') from None
        except BaseException:  # cancelled or failed: nothing may stay behind
            await self.stop()
            raise

    async def stop(self) -> None:
        """Removes the container and its volumes. Safe to call twice, or unstarted.

        Where the engine is gone the container ends by itself (see above), so that is only logged.
        """
        creating, self._creating = self._creating, None
        if creating is None:
            return
        await asyncio.wait({creating})
        try:
            if creating.exception() is None:
                await self._engine.call(containers.remove, self._engine, self._name)
        except SandboxError as error:
            log.warning('%s is left to the engine: %s', self._name, error)
        finally:
            self._close_shell()
            if self._control is not None:
                self._control.close()
            elif creating.exception() is None:
                creating.result().close()
            self._control = None

    # The rest is one sandbox's plumbing, from the outside in.

    def _create(self, image: Image) -> socket.socket:
        """In a thread."""
        try:
            return containers.create(
                self._engine, self.task, image, self._name, self._limits, self._runtime
            )
        except docker.errors.NotFound as error:
            self._images.forget(self.task)
            raise SandboxError(f'{self.task.task_id}: {engine.brief(error)}; try again') from None

    def _running(self) -> bool:
        return self._control is not None

    async def _end_all(self) -> None:
        await self._requests.ask('kill')  # ends the streams, too
        self._close_shell()

    def _close_shell(self) -> None:
        if self._shell is not None:
            self._shell.close()
        self._shell, self._unread = None, (b'', b'')

    async def _open_shell(self) -> None:
        for attempt in (1, 2):
            nonce, workdir = secrets.token_hex(8), channels.quote(self._workdir)
            line = f'exec 8>&1 9>&2 2>/dev/null;cd -- {self._cwd or workdir} || cd -- {workdir};'
            if self._bash_env is not None:  # for the shell's children; the shell itself is ours
                line += f'export BASH_ENV={channels.quote(self._bash_env)};'
            line += f'unset OLDPWD HOSTNAME;{channels.report(nonce)}\n'
            try:
                async with asyncio.timeout(_STARTUP_SEC):
                    stream = await self._ask(self._exec_shell)
                    self._shell = await engine.Streams.open(stream)
                    await self._shell.write(line.encode(errors='surrogateescape'))
                    while nonce not in await self._shell.read_line():
                        pass
                return
            except (EOFError, ConnectionError, TimeoutError):  # a fork bomb, perhaps: clear it
                self._close_shell()
                if attempt == 2:
                    raise SandboxError('no shell starts in the sandbox') from None
                await self._kill()

    def _exec_shell(self) -> socket.socket:
        api, user = self._engine.client.api, self._images.user
        self._exec = api.exec_create(self._name, _SHELL, stdin=True, user=f'{user}:{user}')['Id']
        return self._engine.stream(api.exec_start(self._exec, socket=True))

    async def _run(self, command: str, timeout: float) -> CommandResult:
        nonce = secrets.token_hex(8)
        out = _Output(b'%b ' % nonce.encode(), self._output_bytes)
        err = _Output(b'\x1e%b' % nonce.encode(), self._output_bytes)
        # The report is stdout's; this is the same for stderr.
        then = f";builtin printf '\\036%s\\n' {nonce} >&9"
        script = channels.script(command, self._last_exit, nonce, then)
        try:
            async with asyncio.timeout(timeout):
                kind, exit_code = await self._watch(script, out, err)
                if kind == 'reported' and await self._too_much_written():
                    kind, exit_code = 'full', _KILLED
        except TimeoutError:
            kind, exit_code = 'timeout', -1
        if kind == 'dead':
            self._close_shell()
        elif kind != 'reported':
            await self._kill()
        else:
            self._cwd = out.end[2].decode(errors='surrogateescape')
            self._unread = (out.after, err.after)
        self._last_exit = exit_code if kind == 'reported' else 0
        note = 'sandbox: disk limit exceeded\n' if kind == 'full' else ''
        return CommandResult(out.text(), err.text() + note, exit_code, kind == 'timeout')

    async def _watch(self, script: bytes, out: '_Output', err: '_Output') -> tuple[str, int]:
        """How the command ended, and its exit code. A streams' end tells of most dead shells; one
        whose background holds the streams is found by asking the engine now and then.
        """
        reading = asyncio.create_task(self._converse(script, out, err))
        pause, longest = _LOOK_SEC
        try:
            while not (await asyncio.wait({reading}, timeout=pause))[0]:
                if out.end:
                    if not (await asyncio.wait({reading}, timeout=_REPORT_SEC))[0]:
                        return 'lost', int(out.end[1])  # the command spoiled descriptor 9
                    continue
                status = await self._inspect()
                if not status['Running']:
                    return 'dead', status['ExitCode']
                if await self._too_much_written():
                    return 'full', _KILLED
                pause = min(pause * 1.5, longest if self._images.user else _LOOK_AT_DISK_SEC)
            return reading.result()
        except EOFError:
            return 'dead', await self._exit_code()
        finally:
            reading.cancel()

    async def _converse(self, script: bytes, out: '_Output', err: '_Output') -> tuple[str, int]:
        """Gives the shell its script, and reads until both streams have ended for it."""
        out.feed(self._unread[0])
        err.feed(self._unread[1])
        try:
            await self._shell.write(script)
        except ConnectionError:
            raise EOFError from None
        while not (out.end and err.end):
            number, chunk = await self._shell.read()
            (out if number == 1 else err).feed(chunk)
            if out.seen + err.seen > _DISCARD_BYTES:
                return 'flood', _KILLED
        return 'reported', int(out.end[1])

    async def _ask(self, function: Callable, *arguments):
        try:
            return await self._engine.call(function, *arguments)
        except docker.errors.NotFound:
            raise SandboxError('the container died') from None

    async def _inspect(self) -> dict:
        return await self._ask(self._engine.client.api.exec_inspect, self._exec)

    async def _exit_code(self) -> int:
        """Of a shell whose streams have ended; the engine may be a moment behind them."""
        for pause in (0.0, 0.01, 0.05, 0.2, 1.0):
            await asyncio.sleep(pause)
            status = await self._inspect()
            if not status['Running']:
                return status['ExitCode']
        raise SandboxError('the container or its engine died: a shell runs on without its streams')

    async def _too_much_written(self) -> bool:
        """Whether a root's own layer has outgrown `disk_mb`; others cannot write there."""
        if self._images.user or time.monotonic() < self._looked + _LOOK_AT_DISK_SEC:
            return False
        self._looked = time.monotonic()
        written = await self._ask(containers.written, self._engine, self._name)
        return written > self._limits.disk_mb << 20


class _Output:
    """One stream while one command runs: what to keep of it, up to the command's report."""

    def __init__(self, mark: bytes, limit: int):
        self._mark, self._limit = mark, limit
        self._kept, self._recent = bytearray(), bytearray()
        self.seen = 0  # bytes
        self.end: re.Match | None = None
        self.after = b''  # the report

    def feed(self, chunk: bytes) -> None:
        self.seen += len(chunk)
        if self.end:
            self.after = (self.after + chunk)[: self._limit]
            return
        self._recent += chunk
        sure = self._recent.find(self._mark)
        if sure >= 0:
            self.end = _REPORT.match(bytes(self._recent), sure + len(self._mark))
        else:
            sure = max(len(self._recent) - _REPORT_BYTES, 0)
        if self.end:
            self.after = bytes(self._recent[self.end.end() :])
        self._kept += self._recent[: min(sure, self._limit - len(self._kept))]
        del self._recent[: len(self._recent) if self.end else sure]

    def text(self) -> str:
        return bytes((self._kept + self._recent)[: self._limit]).decode(errors='replace')
