"""What the two kinds of container have in common: start and stop, and a shell that is an exec.

The shell behaves as in the local sandbox, with the same lines and the same messages. Reports come
within its streams, with a number drawn for each command, stdout's and stderr's after all that was
written before. One difference: background processes of a shell that ended live on, but nobody reads
what they print.

Process 1 lives as long as its standard input, which this process holds: so a worker that is killed
leaves no container behind.
"""

import abc
import asyncio
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable

import docker

from echo_jax.sandbox import SandboxError, channels
from echo_jax.sandbox import shell as shells
from echo_jax.sandbox.docker import containers, engine
from echo_jax.sandbox.docker.images import Image, Images
from echo_jax.sandbox.shell import Ending
from echo_jax.types import Task

log = logging.getLogger(__name__)

STARTUP_SEC = 60.0  # for what takes a second, with hundreds of others at once
_FIRST_LOOK_SEC = 0.5  # after which a command that runs on is looked at, then less and less often
_REPORT_SEC = 2.0  # between a report's two parts, on a machine that may be overloaded
_LOOK_AT_DISK_SEC = 1.0  # at least, between looks at what was written
_REPORT_BYTES = 16 << 10  # no report is longer
# What follows a report's mark on stdout (exit code and directory) and on stderr. A mark alone is no
# report: a trap of the agent's can find it out and print it.
_REPORT, _END = rb'(\d{1,3}) ([^\n]*)\n', rb'\n'


class ContainerSandbox(shells.ShellSandbox):
    """A sandbox that is a container; see `strict.py` and `plain.py` for the two kinds.

    `output_bytes` of each stream of a command are kept, from its start; the rest is discarded.
    `runtime` is one that the engine knows; None is its default. `container_name` is for whoever
    wants to look inside: `docker exec -it NAME sh`.
    """

    startup_sec = STARTUP_SEC
    longest_look_sec = _LOOK_AT_DISK_SEC  # pause between looks at a command that runs on
    _control: engine.Streams  # of process 1
    _shell: engine.Streams
    _greeting: str  # what the shell printed up to its first report
    _exec: str  # the engine's name of the shell
    _out: '_Output'  # of the last command
    _err: '_Output'

    def __init__(
        self, task: Task, images: Images, runtime: str | None, output_bytes: int, shell: str
    ):
        super().__init__(task, output_bytes, shell)
        self._images, self.engine = images, images.engine
        self.agent_owns_bash = not images.user  # root, or whoever the image says
        self._runtime = runtime
        self.container_name = f'echo_jax-{secrets.token_hex(8)}'
        self._creating: asyncio.Future | None = None
        self._is_open = False  # whether `_control` is
        self._unread = (b'', b'')  # of the last command's background, after its report
        self._looked = 0.0  # at what was written; time.monotonic()

    async def start(self) -> None:
        """Makes the image if need be, and the container. Raises as `Images.image`."""
        try:
            image = await self._images.image(self.task)
            self._workdir = image.workdir
            self._creating = asyncio.wrap_future(self.engine.submit(self._make, image))
            self._control = await engine.Streams.open(await asyncio.shield(self._creating))
            self._is_open = True
            await self._await_ready(image)
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

        If the engine is gone, the container ends by itself (see above), so that is only logged.
        """
        creating, self._creating = self._creating, None
        if creating is None:
            return
        await asyncio.wait({creating})
        try:
            if creating.exception() is None:
                await self.engine.call(containers.remove, self.engine, self.container_name)
        except SandboxError as error:
            log.warning('%s is left to the engine: %s', self.container_name, error)
        finally:
            self._close_shell()
            if self._is_open:
                self._control.close()
            elif creating.exception() is None:
                creating.result().close()
            self._is_open = False

    @abc.abstractmethod
    def _create(self, image: Image) -> socket.socket:
        """Starts the container and returns the streams of its process 1. Runs in a thread."""

    @abc.abstractmethod
    async def _await_ready(self, image: Image) -> None:
        """Waits until it can be used. SandboxError, EOFError or TimeoutError if that is never."""

    @abc.abstractmethod
    def _shell_exec(self) -> dict:
        """How the engine is to start the shell: arguments of the SDK's exec_create."""

    @abc.abstractmethod
    async def _has_overwritten(self) -> bool:
        """Whether more was written than the sandbox may. Called about once a second."""

    async def _lay_environment(self) -> None:
        """Puts environment/ into the working directory if the task names an image to take as it is
        and does not say how to build one, as Harbor does.
        """
        environment = self.task.path / 'environment'
        is_built = (environment / 'Dockerfile').is_file()
        if self.task.docker_image and environment.is_dir() and not is_built:
            await self.upload(environment, self._workdir)

    # The rest is one sandbox's plumbing, from the outside in.

    def _make(self, image: Image) -> socket.socket:
        """Runs in a thread."""
        try:
            return self._create(image)
        except docker.errors.NotFound as error:
            self._images.forget(self.task)
            raise SandboxError(f'{self.task.task_id}: {engine.brief(error)}; try again') from None

    def _running(self) -> bool:
        return self._is_open

    async def _start_shell(self, line: str, nonce: str) -> None:
        line = f'exec 8>&1 9>&2 2>/dev/null;{line}'
        self._shell = await engine.Streams.open(await self._ask(self._open_exec))
        self._of_shell.callback(self._shell.close)
        self._unread = (b'', b'')
        await self._shell.write(line.encode(errors='surrogateescape'))
        self._greeting = ''
        while nonce not in self._greeting:
            self._greeting += await self._shell.read_line() + '\n'

    def _open_exec(self) -> socket.socket:
        """Runs in a thread."""
        self._exec, sock = containers.begin_exec(
            self.engine, self.container_name, **self._shell_exec()
        )
        return sock

    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        self._out = _Output(b'%b ' % nonce.encode(), _REPORT, self._output_bytes)
        self._err = _Output(b'\x1e%b' % nonce.encode(), _END, self._output_bytes)
        # The report is stdout's; this is the same for stderr.
        then = f";builtin printf '\\036%s\\n' {nonce} >&9"
        script = channels.command_lines(command, self._last_exit, nonce, then)
        try:
            async with asyncio.timeout(timeout):
                ending, exit_code = await self._watch(script, self._out, self._err)
        except TimeoutError:
            if not (self._out.report and self._err.report):
                return Ending.TIMEOUT, -1
            # It had ended in time, while we were asking the engine.
            ending, exit_code = Ending.REPORTED, int(self._out.report[1])
        if ending is Ending.REPORTED:
            if await self._too_much_written():
                return Ending.FULL, shells.KILLED
            self._cwd = self._out.directory()
            self._unread = (self._out.after, self._err.after)
        return ending, exit_code

    def _take_output(self) -> tuple[bytes, bytes]:
        return self._out.kept(), self._err.kept()

    async def _watch(self, script: bytes, out: '_Output', err: '_Output') -> tuple[Ending, int]:
        """How the command ended, and its exit code. The end of the streams tells that a shell died;
        if its background still holds them, only the engine knows, which is asked now and then.
        """
        reading = asyncio.create_task(self._converse(script, out, err))
        pause = _FIRST_LOOK_SEC
        try:
            while not (await asyncio.wait({reading}, timeout=pause))[0]:
                if out.report:
                    if not (await asyncio.wait({reading}, timeout=_REPORT_SEC))[0]:
                        return Ending.LOST, int(out.report[1])  # the command spoiled descriptor 9
                    continue
                status = await self._inspect()
                if not status['Running']:
                    return Ending.DEAD, status['ExitCode']
                if await self._too_much_written():
                    return Ending.FULL, shells.KILLED
                pause = min(pause * 1.5, self.longest_look_sec)
            return reading.result()
        except EOFError:
            return Ending.DEAD, await self._exit_code()
        finally:
            reading.cancel()

    async def _converse(self, script: bytes, out: '_Output', err: '_Output') -> tuple[Ending, int]:
        """Gives the shell its script, and reads until both streams have reported."""
        out.feed(self._unread[0])
        err.feed(self._unread[1])
        try:
            await self._shell.write(script)
        except ConnectionError:
            raise EOFError from None
        while not (out.report and err.report):
            number, chunk = await self._shell.read()
            (out if number == 1 else err).feed(chunk)
            if out.seen + err.seen > shells.DISCARD_BYTES:
                return Ending.FLOOD, shells.KILLED
        return Ending.REPORTED, int(out.report[1])

    async def _ask(self, function: Callable, *arguments):
        try:
            return await self.engine.call(function, *arguments)
        except docker.errors.NotFound:
            raise SandboxError('the container died') from None

    async def _inspect(self) -> dict:
        return await self._ask(self.engine.client.api.exec_inspect, self._exec)

    async def _exit_code(self) -> int:
        """The exit code of a shell whose streams have ended. The engine may be a moment behind."""
        for pause in (0.0, 0.01, 0.05, 0.2, 1.0):
            await asyncio.sleep(pause)
            status = await self._inspect()
            if not status['Running']:
                return status['ExitCode']
        raise SandboxError('the container or its engine died: a shell runs on without its streams')

    async def _too_much_written(self) -> bool:
        if time.monotonic() < self._looked + _LOOK_AT_DISK_SEC:
            return False
        self._looked = time.monotonic()
        return await self._has_overwritten()


class _Output:
    """One stream while one command runs: what to keep of it, and the report that ends it."""

    def __init__(self, mark: bytes, rest: bytes, limit: int):
        self._mark, self._report, self._limit = mark, re.compile(mark + rest), limit
        self._kept, self._recent = bytearray(), bytearray()  # sure; may begin a report
        self.seen = 0  # bytes
        self.report: re.Match | None = None
        self.after = b''  # what came after the report

    def feed(self, chunk: bytes) -> None:
        self.seen += len(chunk)
        if self.report:
            self.after = (self.after + chunk)[: self._limit]
            return
        self._recent += chunk
        if self._mark in self._recent:
            self.report = self._report.search(bytes(self._recent))
        if self.report:
            sure, self.after = self.report.start(), bytes(self._recent[self.report.end() :])
        else:
            sure = max(len(self._recent) - _REPORT_BYTES, 0)
        self._kept += self._recent[: min(sure, self._limit - len(self._kept))]
        del self._recent[: len(self._recent) if self.report else sure]

    def directory(self) -> str:
        """The shell's directory, quoted for bash, of stdout's report; '' without one."""
        return self.report[2].decode(errors='surrogateescape') if self.report else ''

    def kept(self) -> bytes:
        return bytes(self._kept + self._recent)
