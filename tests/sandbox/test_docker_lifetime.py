"""Real containers on a real engine: the verifier's path, start and stop, and engines that fail."""

import asyncio
import contextlib
import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from configs.tiny import get_config
from echo_jax import types
from echo_jax.sandbox import SandboxError, docker
from echo_jax.sandbox.docker import engine
from echo_jax.sandbox.make import sandbox_maker
from tests.support import docker_engine
from tests.support.processes import soon
from tests.support.sandboxes import SEC, opened

ROOT = pathlib.Path(__file__).parents[2]


def left(used) -> list[str]:
    """All that the engine has of containers and volumes."""
    api = used.client.api
    volumes = api.volumes()['Volumes'] or []
    return [c['Id'] for c in api.containers(all=True)] + [v['Name'] for v in volumes]


def connections(used) -> int:
    """How many connections this process has to the engine, which are all that a sandbox opens."""
    found = 0
    for entry in pathlib.Path('/proc/self/fd').iterdir():
        with contextlib.suppress(OSError):  # another thread may close it meanwhile
            if os.readlink(entry).startswith('socket:'):
                with socket.socket(fileno=os.dup(int(entry.name))) as sock:
                    found += sock.getpeername() == used.url.removeprefix('unix://')
    return found


# The verifier's path.

_DAEMON = 'while :; do echo 1 > /logs/verifier/reward.txt; mkdir -p /tests/x; sleep 0.01; done'


@pytest.mark.parametrize('user', [1000, 0])
def test_verifier(task, made, user):
    tests = task.path / 'tests'
    (tests / 'data').mkdir(parents=True)
    (tests / 'test.sh').write_text(
        '#!/bin/bash\nls -A /tests | tr "\\n" " "; cat /etc/target 2>/dev/null\n'
        'cp /tests/data/x /logs/verifier/reward.txt\n'
    )
    (tests / 'test.sh').chmod(0o600)
    (tests / 'data' / 'x').write_text('0.5')
    (tests / 'link').symlink_to('data/x')

    async def main():
        async with opened(docker.StrictSandbox(task, images=made[user])) as sandbox:
            hidden = await sandbox.run('ls -A /tests /solution', SEC)
            assert hidden.stdout == '/solution:\n\n/tests:\n'
            for trick in (
                f"setsid nohup bash -c '{_DAEMON}' >/dev/null 2>&1 &",
                'rm -rf /tests/*; ln -s /app /tests/data; ln -s /etc/passwd /tests/test.sh',
                'ls() { echo fake; }; PATH=/app:$PATH; cd /tmp; trap "echo t" DEBUG',
                'for f in tar head cat bash; do printf "#!/bin/sh\\necho 1" > /app/$f; chmod +x '
                '/app/$f; done; export BASH_ENV=/app/bash; rm -rf /logs/verifier; '
                'ln -s /app /logs/verifier; mkdir -p /app/reward.txt; chmod 0 /app/reward.txt',
            ):
                await sandbox.run(trick, SEC)
            result = await sandbox.verify()
            seen = await sandbox.run('command cat /logs/verifier/test-stdout.txt', SEC)
            processes = await sandbox.run('cat /proc/[0-9]*/comm', SEC)
            return result, seen.stdout, processes.stdout.split()

    result, seen, processes = asyncio.run(main())
    assert result[:2] == (0.5, types.Status.OK)
    assert seen == 'data link test.sh '
    assert sorted(processes) == ['bash', 'init']


def test_tests_that_lead_outside_are_refused(task, made, tmp_path):
    tests = task.path / 'tests'
    tests.mkdir()
    (tests / 'link').symlink_to('/etc/hostname')
    (tmp_path / 'file').write_text('harness')

    async def main():
        async with opened(docker.StrictSandbox(task, images=made[1000])) as sandbox:
            with pytest.raises(ValueError, match='leads outside'):
                await sandbox.upload(tests, '/tests')
            await sandbox.run('ln -s /root /tests/in; ln -s /etc/hosts /app/f', SEC)
            with pytest.raises(SandboxError, match='link'):
                await sandbox.upload(tmp_path / 'file', '/tests/in/file')
            await sandbox.upload(tmp_path / 'file', '/app/f')  # replaces the link
            await sandbox.upload(tmp_path / 'file', "/app/new dir/it's\n%b")
            with pytest.raises(SandboxError, match='Read-only'):
                await sandbox.upload(tmp_path / 'file', '/usr/file')
            return await sandbox.run('ls -A /root | grep -cx file; cat /app/f /app/new*/*', SEC)

    assert asyncio.run(main()).stdout == '0\nharnessharness'


# Start and stop.


@pytest.mark.parametrize('user', [1000, None])
def test_stop_leaves_nothing(container, used, user):
    before = left(used)
    used.client.close()  # its pooled connections; the next call opens new ones
    assert connections(used) == 0

    async def main():
        async with opened(container(user)) as sandbox:
            await sandbox.run('setsid sleep 100 & nohup sleep 100 & trap "" TERM HUP', SEC)
            assert len(left(used)) == len(before) + 1
            assert connections(used) >= 2  # of process 1 and of the shell
        await sandbox.stop()  # twice is fine
        assert left(used) == before
        with pytest.raises(SandboxError, match='start'):
            await sandbox.run('true', 1)

    asyncio.run(main())
    used.client.close()
    assert connections(used) == 0


@pytest.mark.parametrize('user', [1000, None])
def test_cancelled_start_leaves_nothing(container, used, user):
    before = left(used)

    async def main():
        for delay in (0.0, 0.03, 0.1, 0.3, 0.5):
            sandbox = container(user)
            start = asyncio.create_task(sandbox.start())
            await asyncio.sleep(delay)
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # or it was up already
                await start
            await sandbox.stop()

    asyncio.run(main())
    assert left(used) == before


@pytest.mark.parametrize('user', [1000, None])
def test_cancelled_command_is_cleared_away(container, user):
    async def main():
        async with opened(container(user)) as sandbox:
            slow = asyncio.create_task(sandbox.run('echo stale; sleep 60', SEC))
            await asyncio.sleep(0.3)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return await sandbox.run('echo fresh; cat /proc/[0-9]*/comm | grep -c sleep', SEC)

    assert asyncio.run(main()).stdout == 'fresh\n0\n'


@pytest.mark.parametrize('user', [1000, None])
def test_a_container_that_dies_says_so(container, used, user):
    async def main():
        for command in ('sleep 60', None):
            async with opened(container(user)) as sandbox:
                running = asyncio.create_task(sandbox.run(command, SEC)) if command else None
                await asyncio.sleep(0.2)
                used.client.api.remove_container(sandbox.container_name, force=True)
                started = time.monotonic()
                with pytest.raises(SandboxError, match='died'):
                    await (running or sandbox.run('true', SEC))
                assert time.monotonic() - started < 10

    asyncio.run(main())


_WORKER = """
import asyncio, pathlib, sys
from echo_jax import types
from echo_jax.sandbox import docker
from tests.support import docker_engine
from echo_jax.sandbox.docker import engine, images
async def main(url, image, run, worker):
    used = engine.Engine(url, run=run, worker=worker)
    made = images.Images(used, network=False)
    task = types.Task('t', pathlib.Path('.'), 'x', docker_image=image)
    sandbox = docker.PlainSandbox(task, images=made)
    await sandbox.start()
    await sandbox.run('setsid sleep 100 & trap "" TERM', 9)
    # As a worker that dies between the two steps of a start leaves it.
    used.client.api.create_container(image, 'true', labels=used.labels())
    used.client.api.create_volume(labels=used.labels())
    print('up', flush=True)
    await sandbox.run('sleep 100', 100)
asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.contextmanager
def worker(daemon, run: str, name: str):
    process = subprocess.Popen(
        [sys.executable, '-c', _WORKER, daemon.url, docker_engine.BASE, run, name],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b'up\n'
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_worker_leaves_what_its_successor_sweeps(daemon, used, made):
    before = left(used)
    mine = engine.Engine(daemon.url, run='run', worker='a')
    with worker(daemon, 'run', 'b') as alive:
        others = left(used)
        with worker(daemon, 'run', 'a') as process:
            assert len(left(used)) == len(others) + 3
            assert docker.sweep(mine) == []  # it is alive
            process.send_signal(signal.SIGKILL)
        # The running one ends by itself; what had not begun, and volumes, are swept.
        assert soon(lambda: len(left(used)) == len(others) + 2)
        assert len(docker.sweep(mine)) == 2
        assert sorted(left(used)) == sorted(others)
        assert docker.sweep(used) == [] and alive.poll() is None
    assert soon(lambda: len(left(used)) == len(others) - 1)
    assert len(docker.sweep(engine.Engine(daemon.url, run='run', worker='b'))) == 2
    assert sorted(left(used)) == sorted(before)


@pytest.mark.parametrize('user', [1000, None])
def test_thirty_two_at_once(container, used, user):
    before = left(used)

    async def one(number: int):
        async with opened(container(user)) as sandbox:
            await sandbox.run(f'echo {number} > /tmp/n; cd /', SEC)
            return (await sandbox.run('cat /tmp/n; ls /tmp', SEC)).stdout

    async def main():
        return await asyncio.gather(*(one(number) for number in range(32)))

    assert asyncio.run(main()) == [f'{number}\nn\n' for number in range(32)]
    assert left(used) == before


# The engine's own failures.


def test_no_engine_says_what_to_do(tmp_path):
    for url in (f'unix://{tmp_path}/none.sock', 'tcp://127.0.0.1:1'):
        started = time.monotonic()
        with pytest.raises(SandboxError, match='start dockerd or set DOCKER_HOST') as caught:
            engine.Engine(url)
        assert '\n' not in str(caught.value) and url in str(caught.value)
        assert time.monotonic() - started < 5


def test_an_owner_is_a_process_for_good():
    name = engine.owner(os.getpid())
    assert name.startswith(f'{socket.gethostname()}:{os.getpid()}:')
    assert name == engine.owner(os.getpid()) != engine.owner(os.getppid())
    assert engine.owner(2**22 + 1) == ''


# The SDK leaves a socket open that it cannot connect.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_killed_engine(task, made, used, daemon):
    if daemon.process is None:
        pytest.skip('the engine is not ours to kill')
    before = left(used)

    async def main():
        busy = docker.StrictSandbox(task, images=made[1000])
        idle = docker.PlainSandbox(task, images=made[None])
        await asyncio.gather(busy.start(), idle.start())
        running = asyncio.create_task(busy.run('sleep 60', 60))
        await asyncio.sleep(0.3)
        daemon.kill()
        started = time.monotonic()
        for operation in (
            lambda: running,
            lambda: idle.run('true', SEC),
            lambda: idle.upload(pathlib.Path('/etc/hostname'), '/app/x'),
            idle.reset,
            idle.verify,
            docker.StrictSandbox(task, images=made[1000]).start,
        ):
            with pytest.raises(SandboxError) as caught:
                await operation()
            assert '\n' not in str(caught.value)
        await asyncio.gather(busy.stop(), idle.stop())  # logged, not raised
        assert time.monotonic() - started < 15
        await asyncio.to_thread(daemon.start)
        async with opened(docker.StrictSandbox(task, images=made[1000])) as again:
            assert (await again.run('echo back', SEC)).stdout == 'back\n'

    asyncio.run(main())
    docker.sweep(used)
    assert soon(lambda: left(used) == before), left(used)
    gc.collect()


def test_the_recipes_runtime(task, daemon, monkeypatch):
    monkeypatch.setenv('DOCKER_HOST', daemon.url)
    config = get_config()
    config.sandbox.backend, config.sandbox.build_network = 'docker', False
    config.sandbox.runtime = 'nope'
    with pytest.raises(ValueError, match=r"sandbox.runtime is 'nope', .* one of .*runc") as caught:
        sandbox_maker(config)
    assert '\n' not in str(caught.value)

    async def runtime(make) -> str:
        async with opened(make(task)) as sandbox:
            assert (await sandbox.run('echo here', SEC)).stdout == 'here\n'
            (found,) = used.client.api.containers(filters={'label': 'echo_jax.task=task'})
            return used.client.api.inspect_container(found['Id'])['HostConfig']['Runtime']

    config.sandbox.runtime = 'runc'
    used = engine.Engine(daemon.url)
    with contextlib.closing(used), contextlib.closing(sandbox_maker(config)) as make:
        assert asyncio.run(runtime(make)) == 'runc'
