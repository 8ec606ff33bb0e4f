"""Calls to a Docker engine from asyncio, and the raw streams of a process that it runs.

The Docker SDK blocks, so each call takes a thread of a small pool. Streams are read by hand and
not by the SDK, whose readers would block a thread for each container. Every way in which an engine
fails is a SandboxError of one line. Knows nothing of images, tasks or shells.
"""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import socket
import struct
import urllib.parse
from collections.abc import Callable
from typing import Any

import docker
import requests
import urllib3

from echo_jax.sandbox import SandboxError, SandboxUnavailable, channels

_CALLS_AT_ONCE = 8  # the engine itself works on few things at a time
FAILURES = (docker.errors.DockerException, requests.RequestException, urllib3.exceptions.HTTPError)
_HEADER = struct.Struct('>BxxxL')  # of a frame: 1 stdout or 2 stderr, its length in bytes


class Engine:
    """A client of one engine, and the labels of all that is made with it.

    `url` is as in DOCKER_HOST, which is the default. `run` and `worker` name who makes things; see
    `containers.sweep`. Serves any number of event loops, one after the other or at once.
    """

    def __init__(
        self, url: str | None = None, *, run: str = '', worker: str = '', timeout: int = 60
    ):
        """Raises SandboxError if no engine answers. `timeout` bounds a call, in seconds."""
        self.url = url or os.environ.get('DOCKER_HOST') or 'unix:///var/run/docker.sock'
        self.run, self.worker = run, worker
        self._pool = concurrent.futures.ThreadPoolExecutor(_CALLS_AT_ONCE, 'docker')
        try:
            self._expect_listener(timeout)
            options = docker.utils.kwargs_from_env() | {'base_url': self.url}
            self.client = docker.DockerClient(**options, timeout=timeout)
            self.info = self.client.info()
        except (*FAILURES, OSError) as error:
            raise SandboxError(
                f'no Docker engine answers at {self.url} ({brief(error)}); start dockerd or set '
                "DOCKER_HOST, or set sandbox.backend to 'local'"
            ) from None

    def labels(self) -> dict[str, str]:
        """Says who made a container, an image or a volume."""
        return {
            'echo_jax.run': self.run,
            'echo_jax.worker': self.worker,
            'echo_jax.owner': owner(os.getpid()),
        }

    def blocking(self, function: Callable, *arguments, **keywords):
        """`function(...)`, with the engine's failures as SandboxError, and as SandboxUnavailable if
        the engine is gone. NotFound passes through.
        """
        try:
            self._expect_listener(self.client.api.timeout)
        except OSError as error:
            raise SandboxUnavailable(f'Docker engine {self.url}: {error}') from None
        try:
            return function(*arguments, **keywords)
        except docker.errors.NotFound:
            raise
        except FAILURES as error:
            kind = SandboxError if self._answers() else SandboxUnavailable
            raise kind(f'Docker engine {self.url}: {brief(error)}') from None

    def _answers(self) -> bool:
        try:
            self._expect_listener(self.client.api.timeout)
            return self.client.ping()
        except (*FAILURES, OSError):
            return False

    def _expect_listener(self, timeout: float) -> None:
        """Raises OSError if nobody listens on the engine's Unix socket. It is asked before the SDK,
        which leaves a socket that it cannot connect to the garbage collector.
        """
        if self.url.startswith('unix://'):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(timeout)
                probe.connect(self.url.removeprefix('unix://'))

    def submit(self, function: Callable, *arguments, **keywords) -> concurrent.futures.Future:
        return self._pool.submit(self.blocking, function, *arguments, **keywords)

    async def call(self, function: Callable, *arguments, **keywords):
        """`blocking` in a thread. It runs to its end even if the caller is cancelled."""
        return await wait_for(self.submit(function, *arguments, **keywords))

    def hijack(self, path: str, body: Any = None) -> socket.socket:
        """POSTs a request whose connection the engine then hands over; the socket, ours alone.

        Not by the SDK's `attach_socket` and `exec_start`: what these return keeps the connection
        open until the garbage collector comes by, and nothing public closes it. They also lose what
        a process prints at once: it may arrive with the headers, in the buffer that these are read
        through.
        """
        api = self.client.api
        if not self.url.startswith('unix://') and not api.base_url.startswith('http://'):
            raise SandboxError(
                f'{self.url}: neither TLS nor ssh:// is supported; use unix:// or a tunnel to it'
            )
        connection = http.client.HTTPConnection('docker')
        content = b'' if body is None else json.dumps(body).encode()
        headers = {'Connection': 'Upgrade', 'Upgrade': 'tcp', 'Content-Type': 'application/json'}
        told = b''
        with contextlib.ExitStack() as undo:
            try:
                connection.sock = sock = undo.enter_context(self._connect())
                connection.request('POST', f'/v{api.api_version}{path}', content, headers)
                own = undo.enter_context(socket.socket(fileno=os.dup(sock.fileno())))
                response = undo.enter_context(connection.getresponse())
                if response.status >= 400:
                    told = b''.join(iter(lambda: response.read(4096), b''))
            except (OSError, http.client.HTTPException) as error:
                raise docker.errors.DockerException(f'{path}: {error!r}') from error
            if response.status >= 400:
                is_missing = response.status == http.HTTPStatus.NOT_FOUND
                kind = docker.errors.NotFound if is_missing else docker.errors.APIError
                explanation = told.decode(errors='replace')
                raise kind(f'{path}: {response.status}', explanation=explanation)
            handed = socket.socket(fileno=own.detach())
        handed.setblocking(False)
        return handed

    def _connect(self) -> '_Unbuffered':
        api = self.client.api
        if not self.url.startswith('unix://'):
            place = urllib.parse.urlsplit(api.base_url)  # the SDK's, with what DOCKER_HOST left out
            sock = socket.create_connection((place.hostname, place.port or 80), api.timeout)
            unbuffered = _Unbuffered(fileno=sock.detach())
            unbuffered.settimeout(api.timeout)
            return unbuffered
        with contextlib.ExitStack() as undo:
            unbuffered = undo.enter_context(_Unbuffered(socket.AF_UNIX))
            unbuffered.settimeout(api.timeout)
            unbuffered.connect(self.url.removeprefix('unix://'))
            undo.pop_all()
            return unbuffered

    def close(self) -> None:
        """Waits for calls under way and closes the connections."""
        self._pool.shutdown(cancel_futures=True)
        self.client.close()


class _Unbuffered(socket.socket):
    """For http.client, which reads the headers of a response from it and not a byte more."""

    def makefile(self, *mode, **options):
        del mode, options
        return super().makefile('rb', buffering=0)


async def wait_for(future: concurrent.futures.Future):
    """The result of `future`. Cancelling one waiter does not cancel the work for the others."""
    return await asyncio.shield(asyncio.wrap_future(future))


def brief(error: Exception) -> str:
    """An engine's message on one line."""
    text = str(error)
    if isinstance(error, docker.errors.APIError):
        text = error.explanation or text
    if isinstance(text, bytes):
        text = text.decode(errors='replace')
    return '; '.join(line.strip() for line in text.splitlines() if line.strip())[-1000:]


def owner(pid: int) -> str:
    """A name for a process that no other has: host, pid, tick of its start; '' if it is dead."""
    with contextlib.suppress(OSError):
        began = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]
        return f'{socket.gethostname()}:{pid}:{began}'
    return ''


class Streams:
    """Standard input, output and error of one process, over a hijacked connection."""

    def __init__(self, descriptor: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._descriptor, self._reader, self._writer = descriptor, reader, writer
        channels.not_for_forks.add(descriptor)

    @classmethod
    async def open(cls, sock: socket.socket) -> 'Streams':
        return cls(sock.fileno(), *await asyncio.open_connection(sock=sock))

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read(self) -> tuple[int, bytes]:
        """(1, bytes of stdout) or (2, of stderr). EOFError if the process or the engine is gone."""
        try:
            number, size = _HEADER.unpack(await self._reader.readexactly(_HEADER.size))
            return number, await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise EOFError from None

    async def read_line(self) -> str:
        """The text on stdout up to a newline, without it."""
        parts = [b'']
        while not parts[-1].endswith(b'\n'):
            parts.append((await self.read())[1])
        return b''.join(parts).decode(errors='replace').rstrip('\n')

    def close(self) -> None:
        channels.not_for_forks.discard(self._descriptor)
        self._writer.transport.abort()
