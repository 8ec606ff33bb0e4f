"""How local sandboxes start, end, and are refused, on both backends. Linux only."""

import asyncio
import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys

import pytest

from echo_jax import types
from echo_jax.sandbox import CommandResult, SandboxError, channels, local
from echo_jax.sandbox.local import namespaces
from tests.support.processes import comm, descendants, ended, marked, open_files, soon, status
from tests.support.sandboxes import SEC, opened

ROOT = pathlib.Path(__file__).parents[2]

# Start and stop.


def test_task_env_and_workdir(backend, tmp_path):
    task = types.Task('t', tmp_path, 'x', workdir='/data/in', env={'A': "it's\n2"})

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            first = await sandbox.run('pwd; echo "$A"; touch here', SEC)
            await sandbox.reset()
            return first, await sandbox.run('ls; echo "$A" | wc -l', SEC)

    first, second = asyncio.run(main())
    assert first == CommandResult("/data/in\nit's\n2\n", '', 0, False)
    assert second.stdout == 'here\n2\n'


def mounts() -> list[str]:
    """The host's, without those of a Docker engine, which other tests may have at the same time."""
    lines = pathlib.Path('/proc/self/mountinfo').read_text().splitlines()
    return [line for line in lines if 'docker' not in line]


def test_stop_leaves_nothing(task, backend, monkeypatch, tmp_path):
    temporary = tmp_path / 'temporary'
    temporary.mkdir()
    monkeypatch.setenv('TMPDIR', str(temporary))  # of the programs that it starts, too
    monkeypatch.setattr('tempfile.tempdir', None)  # so that it is asked for anew
    before, descriptors = (descendants(os.getpid()), mounts()), open_files()

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            await sandbox.run('setsid sleep 100 & nohup sleep 100 & trap "" TERM HUP', SEC)
            assert descendants(os.getpid()) > before[0]
        await sandbox.stop()  # twice is fine
        with pytest.raises(SandboxError, match='start'):
            await sandbox.run('true', 1)

    asyncio.run(main())
    assert descendants(os.getpid()) == before[0]
    assert mounts() == before[1]
    # Another thread of this process may have one open for a moment.
    assert soon(lambda: not open_files() - descriptors)
    assert not list(temporary.iterdir())


def test_cancelled_command_is_cleared_away(task, backend):
    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            slow = asyncio.create_task(sandbox.run('echo stale; sleep 60', SEC))
            await asyncio.sleep(0.3)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return await sandbox.run('echo fresh; ps ax | grep -c "[s]leep 60"', SEC)

    assert asyncio.run(main()).stdout == 'fresh\n0\n'


def test_a_dead_sandbox_says_so(task, backend):
    async def main(command: str | None):
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            inits = [p for p in descendants(os.getpid()) if status(p, 'NSpid').split()[-1] == '1']
            running = asyncio.create_task(sandbox.run(command, SEC)) if command else None
            await asyncio.sleep(0.2)
            for pid in inits:
                os.kill(pid, signal.SIGKILL)
            if not running:
                await asyncio.sleep(0.2)
            with pytest.raises(SandboxError, match='died'):
                await (running or sandbox.run('true', SEC))

    asyncio.run(main('sleep 60'))
    asyncio.run(main(None))


_PARENT = """
import asyncio, pathlib, sys
from echo_jax import types
from echo_jax.sandbox.local import LocalSandbox
async def main():
    sandbox = LocalSandbox(types.Task('t', pathlib.Path(sys.argv[2]), 'x'), backend=sys.argv[1])
    await sandbox.start()
    await sandbox.run('setsid sleep 100 & trap "" TERM', 9)
    print('up', flush=True)
    await sandbox.run('sleep 100', 100)
asyncio.run(main())
"""


def test_killed_parent_leaves_nothing(backend, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, '-c', _PARENT, backend, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert parent.stdout.readline() == b'up\n'
        inside = descendants(parent.pid)
        assert len(inside) >= 4
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    assert soon(lambda: all(ended(pid) for pid in inside)), [comm(pid) for pid in inside]


_SUICIDE = _PARENT.replace(
    'async def main():',
    'async def main():\n    asyncio.get_running_loop().call_later('
    'float(sys.argv[3]), os.kill, os.getpid(), 9)',
).replace('import asyncio', 'import asyncio, os')


@pytest.mark.slow
def test_parent_killed_during_start_leaves_nothing(backend, tmp_path):
    environment = os.environ | {'PATH': f'{os.environ["PATH"]}:{tmp_path}/mark'}
    for delay in ('0', '0.002', '0.005', '0.01', '0.03', '0.06'):
        arguments = [sys.executable, '-c', _SUICIDE, backend, str(tmp_path), delay]
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, check=False, stdout=subprocess.DEVNULL
        )
        assert done.returncode == -signal.SIGKILL
    assert soon(lambda: not marked(f'{tmp_path}/mark')), marked(f'{tmp_path}/mark')


def test_cancelled_start_leaves_nothing(task, backend, monkeypatch, tmp_path):
    local.check(backend)
    monkeypatch.setenv('PATH', f'{os.environ["PATH"]}:{tmp_path}/mark')

    cancelled = []

    async def main():
        for number in range(60):  # a moment later each time
            box = local.LocalSandbox(task, backend=backend)
            start = asyncio.create_task(box.start())
            await asyncio.sleep(number * 0.0002)
            if not start.cancel():  # this machine is busy, and it was open before
                await start
                await box.stop()
                continue
            with pytest.raises(asyncio.CancelledError):
                await start
            cancelled.append(number)

    asyncio.run(main())
    assert len(cancelled) > 10
    assert soon(lambda: not marked(f'{tmp_path}/mark')), marked(f'{tmp_path}/mark')


async def start_and_stop(task, backend) -> None:
    async with opened(local.LocalSandbox(task, backend=backend)):
        pass


def test_a_start_without_descriptors_leaves_nothing(task, backend):
    """Each time there is room for one more of its numbers, which begin at 64."""
    asyncio.run(start_and_stop(task, backend))  # so that all is known that is looked up once
    before = open_files()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def start(room: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64 + room, hard))
        try:
            await start_and_stop(task, backend)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    for room in range(10):  # two of each of four pipes, and one of each of two pairs of sockets
        with pytest.raises(SandboxError, match=rf'{backend} opened no sandbox: \[Errno '):
            asyncio.run(start(room))
    assert soon(lambda: not open_files() - before), open_files() - before


def test_a_start_without_room_for_a_process_leaves_nothing(task, backend, monkeypatch):
    """That is made up, since a test that runs as root can have any number of processes."""
    asyncio.run(start_and_stop(task, backend))  # so that all is known that is looked up once
    before, kept = open_files(), set(channels.not_for_forks)

    def refuse(*arguments, **options):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, 'Popen', refuse)
    with pytest.raises(SandboxError, match=f'{backend} opened no sandbox: .*temporarily'):
        asyncio.run(start_and_stop(task, backend))
    assert soon(lambda: not open_files() - before), open_files() - before
    assert channels.not_for_forks == kept


_FORKER = _PARENT.replace('import asyncio', 'import asyncio, os, time').replace(
    "    print('up'",
    "    if os.fork() == 0:\n        time.sleep(30)\n        os._exit(0)\n    print('up'",
)


def test_forked_worker_does_not_keep_a_sandbox_alive(backend, tmp_path):
    mark = f'{tmp_path}/mark'
    parent = subprocess.Popen(
        [sys.executable, '-c', _FORKER, backend, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {'PATH': f'{os.environ["PATH"]}:{mark}'},
        stdout=subprocess.PIPE,
    )
    try:
        assert parent.stdout.readline() == b'up\n'
        worker = next(p for p in descendants(parent.pid) if comm(p) == comm(parent.pid))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    try:  # of all that had the mark, only the worker is left
        assert soon(lambda: len(marked(mark)) == 1), marked(mark)
        assert not ended(worker)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_many_at_once(task, backend):
    async def one(number: int):
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            await sandbox.run(f'echo {number} > /app/n; cd /tmp', SEC)
            return (await sandbox.run('cat /app/n; ls /app', SEC)).stdout

    async def main():
        return await asyncio.gather(*(one(number) for number in range(32)))

    assert asyncio.run(main()) == [f'{number}\nn\n' for number in range(32)]


# Where namespaces are refused.

_CHECK = """
from echo_jax.sandbox import SandboxError, local
try:
    print(local.check({!r}))
except SandboxError as error:
    print('refused', error)
"""


def _check(backend: str, prefix: tuple[str, ...] = (), **environment: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, '-c', _CHECK.format(backend)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize('name', ['auto', *namespaces.BACKENDS])
def test_missing_tools_are_named(name, tmp_path):
    lines = _check(name, PATH=str(tmp_path)).splitlines()
    assert len(lines) == 1 and lines[0].startswith('refused')
    assert 'install bubblewrap' in lines[0] and 'is not installed' in lines[0]


def test_refused_namespaces_say_what_to_allow(backend):
    # In a user namespace whose own limit is 0, nobody may open another one.
    limit = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    prefix = ('unshare', '--user', '--map-root-user', 'sh', '-c', limit, 'sh')
    lines = _check(backend, prefix).splitlines()
    assert len(lines) == 1 and lines[0].startswith('refused')
    for word in ('unprivileged_userns_clone', 'apparmor', 'max_user_namespaces', backend):
        assert word in lines[0]


def test_check_names_the_backend(backend):
    assert local.check(backend) == backend
    with pytest.raises(ValueError, match='docker'):
        local.check('docker')


@pytest.mark.parametrize('name', namespaces.BACKENDS)
def test_tools_that_hang_are_named(name, tmp_path, monkeypatch):
    for tool in ('bwrap', 'setpriv', 'unshare'):
        (tmp_path / tool).write_text('#!/bin/sh\nexec sleep 60\n')
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
    monkeypatch.setattr(namespaces, 'CHECK_SEC', 0.2)
    with pytest.raises(SandboxError, match=f'{name}: it did not answer in 0.2 s'):
        local.check(name)
