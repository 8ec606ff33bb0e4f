"""Calls to a real engine: one that is slow to answer, and one that is away."""

import asyncio
import contextlib
import threading

import docker as docker_sdk
import pytest

from echo_jax.sandbox import SandboxUnavailable
from echo_jax.sandbox.docker import containers, engine
from tests.support.processes import open_files, soon
from tests.support.sandboxes import opened


@contextlib.contextmanager
def relayed(url: str, place: str):
    """Yields the URL of an engine that is slow to answer, as on a busy machine.

    So a response arrives together with the stream that follows its headers.
    """

    async def pass_on(reader, writer, seconds):
        while chunk := await reader.read(1 << 16):
            await asyncio.sleep(seconds)  # what comes meanwhile is read from the same buffer
            writer.write(chunk + await available(reader))
            await writer.drain()
        writer.close()

    async def available(reader):
        try:
            return await asyncio.wait_for(reader.read(1 << 16), 0.01)
        except TimeoutError:
            return b''

    async def serve(reader, writer):
        path = url.removeprefix('unix://')
        from_engine, to_engine = await asyncio.open_unix_connection(path)
        try:
            await asyncio.gather(pass_on(reader, to_engine, 0), pass_on(from_engine, writer, 0.3))
        except ConnectionError:
            pass
        finally:
            to_engine.close()
            writer.close()

    async def main(ready, end):
        async with await asyncio.start_unix_server(serve, place):
            ready.set()
            await asyncio.to_thread(end.wait)

    ready, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main(ready, end)))
    thread.start()
    ready.wait()
    try:
        yield f'unix://{place}'
    finally:
        end.set()
        thread.join()


def test_what_a_process_prints_at_once_is_not_lost(daemon, container, tmp_path):
    """Without it a hidden reward would not be seen, or a right one be lost."""

    async def main():
        async with opened(container(None)) as sandbox:
            with relayed(daemon.url, f'{tmp_path}/slow.sock') as url:
                slow = engine.Engine(url)
                _, sock = await slow.call(
                    containers.begin_exec, slow, sandbox.container_name, cmd=['echo', 'here']
                )
                streams = await engine.Streams.open(sock)
                told = await streams.read_line()
                streams.close()
                with pytest.raises(docker_sdk.errors.NotFound, match='No such exec'):
                    await slow.call(slow.hijack, '/exec/none/start', {'Tty': False})
                slow.close()
                return told

    assert asyncio.run(main()) == 'here'


def test_calls_to_an_engine_that_is_away_leave_no_socket(daemon, tmp_path):
    with relayed(daemon.url, f'{tmp_path}/away.sock') as url:
        away = engine.Engine(url)
    away.client.close()
    before, errors = open_files(), []
    for _ in range(5):
        with pytest.raises(SandboxUnavailable, match=r'away.sock: .* refused') as caught:
            away.blocking(away.client.api.info)
        errors.append(caught.value)  # which would keep what was open when it was raised
    assert soon(lambda: not open_files() - before, 5.0)
    away.close()
