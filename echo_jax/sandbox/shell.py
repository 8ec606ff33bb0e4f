"""What the sandboxes have in common: one shell, and one thing at a time.

A backend says how a shell is opened, how one command runs in it, how files move, and how
everything inside is ended; see `local.py`, `docker.py`, `harbor.py`.
"""

import abc
import asyncio
import pathlib
from collections.abc import Awaitable, Callable

from echo_jax.sandbox import CommandResult, SandboxError, channels

_REPLY_SEC = 20.0  # for what takes milliseconds, on a machine that may be overloaded
# No shell can hold one; said as bash would.
_NUL_RESULT = CommandResult('', 'bash: line 1: command holds a NUL byte\n', 2, False)


class ShellSandbox(abc.ABC):
    """A sandbox (DESIGN 3.7) but for `start`, `stop` and what a backend does its own way.

    `output_bytes` of each stream of a command are kept, from its start, and read of a file.
    """

    def __init__(self, output_bytes: int):
        self._output_bytes = output_bytes
        self._lock = asyncio.Lock()  # one command or request at a time
        self._shell = None  # the backend's handle, while there is a shell
        self._cwd = ''  # of the shell, quoted for bash; empty is the workdir
        self._last_exit = 0
        self._unclean = False  # a command was cancelled: kill before the next
        self._requests: Requests | None = None  # to process 1, where it is ours

    async def run(self, command: str, timeout: float) -> CommandResult:
        """Runs `command` in the shell; `timeout` in seconds. The backend says what outlives what.

        Raises SandboxError where the sandbox does not run, died or hangs, as all methods do.
        """
        self._require_running()
        if '\0' in command:
            return _NUL_RESULT
        async with self._lock:
            if self._unclean:
                await self._kill()
            if self._shell is None:
                await self._open_shell()
            self._unclean = True  # until we know how it ended
            result = await self._run(command, timeout)
            self._unclean = False
            return result

    async def upload(self, path: pathlib.Path, target: str) -> None:
        """Copies a file to the path `target`, or a directory's content into the directory `target`.

        Makes directories on the way; all belongs to the sandbox's user and is readable. Raises
        ValueError for a link that leads outside `path`, SandboxError where it cannot be written.
        """
        directory, content = channels.packed(path, target)
        self._require_running()
        async with self._lock:
            reply = await self._put(directory, content)
        if reply != 'done':
            raise SandboxError(f'cannot upload {path} to {target}: {reply.removeprefix("error ")}')

    async def read(self, path: str) -> bytes:
        """The bytes of a regular file inside; no link is followed to it, no FIFO is waited for.

        Raises FileNotFoundError where there is none, OSError where it is over `output_bytes`.
        """
        limit, path = self._output_bytes, channels.absolute(path)
        self._require_running()
        async with self._lock:
            reply = await self._get(path, limit + 1)
        return channels.content(reply, path, limit)

    async def reset(self) -> None:
        """Kills everything that runs inside and opens a fresh shell in the task's workdir."""
        self._require_running()
        async with self._lock:
            await self._kill()
            self._cwd = ''
            await self._open_shell()

    @abc.abstractmethod
    def _running(self) -> bool:
        """Whether it was started and not stopped."""

    @abc.abstractmethod
    async def _open_shell(self) -> None:
        """Sets `_shell`: a new one in `_cwd`. SandboxError where none can be had."""

    @abc.abstractmethod
    async def _run(self, command: str, timeout: float) -> CommandResult:
        """The same with a shell at hand; sets `_cwd` and `_last_exit`, `_shell` where it ended."""

    async def _kill(self) -> None:
        self._unclean = True
        await self._end_all()
        self._unclean = False

    @abc.abstractmethod
    async def _end_all(self) -> None:
        """Ends every process of the agent and forgets the shell."""

    async def _put(self, directory: str, content: bytes) -> str:
        """Unpacks a tar archive into a directory of the sandbox; 'done', or what went wrong."""
        return await self._requests.ask(f'put {len(content)} {channels.escape(directory)}', content)

    async def _get(self, path: str, count: int) -> str:
        """At most `count` bytes of a regular file, as `channels.content` takes them."""
        return await self._requests.ask(f'get {count} {channels.escape(path)}')

    def _require_running(self) -> None:
        if not self._running():
            raise SandboxError('the sandbox is not running; call start() first')


class Requests:
    """Requests to a sandbox's process 1, one at a time; each has one line for an answer."""

    def __init__(
        self, write: Callable[[bytes], Awaitable], read_line: Callable[[], Awaitable[str]]
    ):
        self._write, self._read_line = write, read_line
        self._pending = ''  # the request that has yet to be answered

    async def ask(self, line: str, payload: bytes = b'') -> str:
        """`line` without its newline, and what follows it."""
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
