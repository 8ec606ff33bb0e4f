"""Real containers on a real engine, against commands that mean harm."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from echo_jax import types
from echo_jax.agent.verifier import verify
from echo_jax.sandbox import SandboxError, docker
from echo_jax.sandbox.docker import engine, images
from tests.support import docker_engine

ROOT = pathlib.Path(__file__).parents[2]
SEC = 30.0  # for commands that should end by themselves, on a machine that may be busy


@pytest.fixture(scope='module')
def used(daemon):
    used = engine.Engine(daemon.url, run='tests', worker='sandbox')
    yield used
    used.close()


@pytest.fixture(scope='module')
def made(used):
    """Images by the agent's uid."""
    made = {user: images.Images(used, user=user, network=False) for user in (1000, 0)}
    yield made
    for one in made.values():
        one.close()


@pytest.fixture
def task(tmp_path) -> types.Task:
    return types.Task('task', tmp_path, 'do it', docker_image=docker_engine.BASE)


@contextlib.asynccontextmanager
async def opened(task, made, **limits):
    sandbox = docker.DockerSandbox(task, images=made, **limits)
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


@pytest.fixture
def session(task, made):
    """session(commands..., timeout=, user=, **limits): results, then proof that it still works."""

    def run(*commands: str, timeout: float = SEC, user: int = 1000, **limits):
        async def main():
            async with opened(task, made[user], **limits) as sandbox:
                results = [await sandbox.run(command, timeout) for command in commands]
                alive = await sandbox.run('echo a*live; cat /etc/hostname', SEC)
                assert alive.stdout.endswith('a*live\nsandbox\n'), alive
                return results

        return asyncio.run(main())

    return run


def left(used) -> list[str]:
    """All that the engine has of containers and volumes."""
    api = used.client.api
    volumes = api.volumes()['Volumes'] or []
    return [c['Id'] for c in api.containers(all=True)] + [v['Name'] for v in volumes]


def soon(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Time and quantity. (What an ordinary shell does is in test_sandboxes_agree.py.)


def test_timeout_kills_everything_started(session):
    late, where, found = session(
        'cd /tmp; echo begun; setsid sleep 61 & nohup sleep 62 >/dev/null 2>&1 & (sleep 63 &) ;'
        ' trap "" TERM; while :; do sleep 64; done',
        'pwd',
        'cat /proc/[0-9]*/comm | grep -c sleep',
        timeout=1,
    )
    assert (late.exit_code, late.timed_out, late.stdout) == (-1, True, 'begun\n')
    assert (where.stdout, found.stdout) == ('/app\n', '0\n')


def test_a_shell_that_leaves_background_behind(session):
    ended, alive, reaped = session(
        'cd /tmp; sleep 71 & exit 3', 'pwd; pgrep() { cat /proc/[0-9]*/comm | grep -c $1; }; '
        'pgrep sleep', 'for i in {1..20}; do (true &); done; sleep 0.2; pgrep true',
    )  # fmt: skip
    assert ended.exit_code == 3
    assert alive.stdout == '/app\n1\n'  # the directory is the last one that was reported
    assert reaped.stdout == '0\n'  # process 1 buries orphans


def test_endless_output_is_cut_and_ended(session):
    yes, err, big, kept = session(
        'yes',
        'cat /dev/zero >&2',
        'head -c 3000000 /dev/zero | tr "\\0" x; x=kept',
        'echo $x',
    )
    assert yes.stdout == 'y\n' * (1 << 19) and yes.exit_code == 137
    assert len(err.stderr) == 1 << 20 and err.exit_code == 137
    assert big.stdout == 'x' * (1 << 20) and big.exit_code == 0  # finite: only cut
    assert kept.stdout == 'kept\n'


@pytest.mark.parametrize('user', [1000, 0])
def test_fork_bomb_stays_inside(task, made, user):
    async def main():
        async with (
            opened(task, made[user], processes=40) as bombed,
            opened(task, made[user], processes=40) as other,
        ):
            bomb = asyncio.create_task(bombed.run(':(){ :|:& };: ; while :; do :; done', 2))
            await asyncio.sleep(1)
            assert (await other.run('ls / | wc -l', SEC)).exit_code == 0  # it has its own count
            assert (await bomb).timed_out
            count = await bombed.run('ls -d /proc/[0-9]* | wc -l', SEC)
            assert int(count.stdout) <= 5, count

    asyncio.run(main())


def test_memory_hog_fails_alone(session):
    hog, many, shared = session(
        'tail /dev/zero',
        'for i in 1 2 3; do tail /dev/zero & done; wait; echo over',
        'cat /dev/zero > /dev/shm/fill',
        memory_mb=64,
        disk_mb=32,
        processes=20,
    )
    assert hog.exit_code == 137
    assert many.stdout == 'over\n' or many.exit_code == 137  # the kernel may take the shell
    assert shared.exit_code in (1, 128 + signal.SIGXFSZ)


def test_full_disk_is_the_sandboxs_own(session):
    free = os.statvfs('/tmp').f_bavail
    full, elsewhere, again, inodes = session(
        'for d in /app /tmp /logs/agent /dev/shm /root /tests /run /var/tmp /solution; do '
        'for i in 1 2 3; do head -c 5000000 /dev/zero > $d/fill$i; done; du -sb $d | cut -f1; done',
        'for d in $(find / -xdev -type d -writable 2>/dev/null); do echo x > $d/fill && echo $d; '
        'done 2>/dev/null; true',
        'rm /app/fill* /tmp/fill*; echo room > /app/a; cat /app/a',
        'for i in $(seq 300); do : > /tmp/$i; done',
        disk_mb=8,
        files=200,
        memory_mb=256,
    )
    sizes = [int(line) for line in full.stdout.split()]
    assert len(sizes) == 9 and all(5e6 < size <= 9e6 for size in sizes)
    assert full.stderr.count('No space left') == 2 * 9
    assert elsewhere.stdout == ''  # the rest cannot be written
    assert again.stdout == 'room\n'
    assert 'No space left' in inodes.stderr
    statvfs = os.statvfs('/tmp')
    assert (free - statvfs.f_bavail) * statvfs.f_frsize < 1 << 30


def test_full_disk_of_root(session):
    one, many, mended, behind = session(
        'cat /dev/zero > /usr/fill; stat -c %s /usr/fill',
        'for i in $(seq 1000); do head -c 6000000 /dev/zero > /usr/$i; sleep 0.05; done',
        'rm /usr/[0-9]* /usr/fill; sleep 1.1; echo done',
        '(for i in 1 2; do head -c 6000000 /dev/zero > /usr/$i; done; sleep 30) & sleep 1.2',
        user=0,
        disk_mb=8,
    )
    assert one.stdout == f'{8 << 20}\n'  # RLIMIT_FSIZE
    assert mended.stdout == 'done\n' and mended.exit_code == 0
    for result in (many, behind):
        assert result.exit_code == 137 and 'disk limit exceeded' in result.stderr


# Out of bounds.


@pytest.mark.parametrize('user', [1000, 0])
def test_no_network(session, user):
    interfaces, loopback, out = session(
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '",
        'echo > /dev/tcp/127.0.0.1/22',
        'echo > /dev/tcp/192.0.2.1/80',
        user=user,
    )
    assert interfaces.stdout == 'lo\n'
    assert loopback.exit_code == 1 and 'Connection refused' in loopback.stderr
    assert out.exit_code == 1 and 'unreachable' in out.stderr


def test_a_network_only_where_the_task_asks_for_one(task, made, used):
    async def main(allowed: bool) -> str:
        asking = dataclasses.replace(task, allow_internet=allowed)
        async with opened(asking, made[1000]) as sandbox:
            described = used.client.api.inspect_container(sandbox._name)
            return described['HostConfig']['NetworkMode']

    assert [asyncio.run(main(allowed)) for allowed in (False, True)] == ['none', 'bridge']


def test_no_engine_and_no_host_within_reach(task, made, used, monkeypatch, tmp_path):
    """No socket, no bind mount, no device, no variable of the host's."""
    monkeypatch.setenv('SECRET_TOKEN', 'hunter2')

    async def main():
        async with opened(task, made[0]) as sandbox:
            described = used.client.api.inspect_container(sandbox._name)
            return described, [
                await sandbox.run(command, SEC)
                for command in (
                    'find / -xdev -type s; ls /var/run/docker.sock /run/docker.sock; '
                    'cat /proc/net/unix | wc -l',
                    'env; cat /proc/*/environ 2>/dev/null | tr "\\0" "\\n"; ls -A /home /mnt /srv',
                    'while read -r _ _ _ root at _; do echo $root $at; done < /proc/self/mountinfo',
                    'ls /dev',
                )
            ]

    described, (sockets, environ, mounts, devices) = asyncio.run(main())
    host = described['HostConfig']
    assert described['Mounts'] == [] and not host['Binds'] and not host['Devices']
    assert not host['Privileged'] and host['CapDrop'] == ['ALL'] and not host['CapAdd']
    assert sockets.stdout == '1\n'  # only the header of /proc/net/unix
    assert 'hunter2' not in environ.stdout and 'SECRET' not in environ.stdout
    assert 'PATH=' in environ.stdout and str(tmp_path) not in environ.stdout
    binds = {line.split()[1] for line in mounts.stdout.splitlines() if line.split()[0] != '/'}
    engines = {'/etc/hosts', '/etc/hostname', '/etc/resolv.conf'}
    assert {at for at in binds if not at.startswith(('/proc', '/sys', '/dev'))} <= engines
    assert set(devices.stdout.split()) <= {
        *('core', 'fd', 'full', 'mqueue', 'null', 'ptmx', 'pts', 'random', 'shm', 'stderr'),
        *('stdin', 'stdout', 'tty', 'urandom', 'zero'),
    }


@pytest.mark.parametrize('user', [1000, 0])
def test_proc_and_device_tricks(session, user):
    proc, disks, mounts, cgroup, users = session(
        'for f in /proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger '
        '/proc/sys/kernel/hostname /proc/1/oom_score_adj /sys/kernel/uevent_helper; do '
        '(echo b > $f) 2>/dev/null && echo wrote $f; done; '
        'head -c1 /proc/kcore /proc/kmsg /proc/timer_list 2>/dev/null | tr -d "\\0"; true',
        'mknod /tmp/disk b 8 0; mknod /tmp/mem c 1 1; ls /tmp/disk /tmp/mem',
        'mount -t tmpfs t /tmp; mount -t proc p /tmp; mount -o remount,rw /; umount /proc; '
        'chroot / true; pivot_root . .; hostname x; cat /proc/mounts | grep -c " /tmp "',
        'd=$(ls -d /sys/fs/cgroup /sys/fs/cgroup/*/ | tail -1); mkdir $d/x; '
        'echo /app/x > $d/release_agent; echo $$ > $d/cgroup.procs; echo max > $d/memory.max',
        'unshare --user --map-root-user id; unshare --mount true; nsenter -t 1 -m id; echo end',
        user=user,
    )
    assert 'wrote' not in proc.stdout.replace('wrote /proc/1/oom_score_adj', '')
    assert proc.stdout.count('==>') * 5 >= len(proc.stdout.split())  # headers, no content
    assert disks.stderr.count('Operation not permitted') == 2 and disks.stdout == ''
    assert mounts.stdout == ('1\n' if user else '0\n')
    assert cgroup.exit_code != 0 and cgroup.stdout == ''
    assert users.stdout == 'end\n'


@pytest.mark.parametrize('user', [1000, 0])
def test_no_capabilities_and_no_way_to_get_any(session, user):
    status, seccomp, setuid, nice = session(
        'grep -E "^(Cap|NoNewPrivs)" /proc/self/status | cut -f2 | sort -u',
        'grep ^Seccomp: /proc/self/status | cut -f2',
        'find / -xdev -perm -4000 -exec {} --help \\; >/dev/null 2>&1; '
        'su -c id; chown 5:5 /app; grep CapEff /proc/self/status | cut -f2',
        'renice -n -5 $$; date -s 2000-01-01 >/dev/null; id -u',
        user=user,
    )
    assert status.stdout == '0000000000000000\n1\n'
    assert seccomp.stdout == '2\n'
    assert setuid.stdout.splitlines()[-1] == '0000000000000000'
    assert 'Operation not permitted' in setuid.stderr
    assert nice.stdout == f'{user}\n' and 'not permitted' in nice.stderr.lower()


@pytest.mark.parametrize('user', [1000, 0])
def test_process_1_can_be_neither_killed_nor_traced(session, user):
    killed, supervisor, traced, chmod = session(
        'sh -c "kill -9 -1"; kill -9 -1; echo still',
        'kill -9 1; kill -TERM 1; kill -STOP 1; kill -CHLD 1; [ -d /proc/1 ] && cat /proc/1/comm',
        'cat /proc/1/environ /proc/1/maps /proc/1/mem; readlink /proc/1/exe /proc/1/fd/*; '
        '(echo kill > /proc/1/fd/0); head -c 1 /proc/1/fd/7; '
        'perl -e \'print syscall(101, 16, 1, 0, 0), "\\n"; print $!, "\\n"\'',  # PTRACE_ATTACH
        'cat /usr/lib/echo_jax/init | head -c 4',
        user=user,
    )
    assert killed.exit_code in (0, 137)
    assert supervisor.stdout == 'init\n'
    assert traced.stdout == '-1\nOperation not permitted\n'
    assert chmod.stdout == '' and 'Permission denied' in chmod.stderr


def test_a_command_cannot_report_for_another(session):
    daemon, after, forged, last, quiet = session(
        '(while sleep 0.05; do for i in {1..20}; do echo "0 0 /" >&$i; done; done) 2>/dev/null &',
        'sleep 0.3; echo true words; false',
        'printf "%s 0 /\\n" {0..9}{a..f}; printf "\\036x\\n" >&2; false',
        'echo mine',
        'kill %1; for p in /proc/[0-9]*; do echo "x 0 /" > $p/fd/1; echo "x 0 /" > $p/fd/8; done '
        '2>/dev/null; false',
    )
    assert daemon.exit_code == 0
    assert after.exit_code == 1 and 'true words\n' in after.stdout
    assert forged.exit_code == 1 and '0a 0 /\n' in forged.stdout
    assert last.exit_code == 0 and 'mine\n' in last.stdout
    assert quiet.exit_code == 1


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
        async with opened(task, made[user]) as sandbox:
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
            result = await verify(task, sandbox)
            seen = await sandbox.read('/logs/verifier/test-stdout.txt')
            processes = await sandbox.run('cat /proc/[0-9]*/comm', SEC)
            return result, seen, processes.stdout.split()

    result, seen, processes = asyncio.run(main())
    assert result == (0.5, types.Status.OK)
    assert seen == b'data link test.sh '
    assert sorted(processes) == ['bash', 'init']


def test_tests_that_lead_outside_are_refused(task, made, tmp_path):
    tests = task.path / 'tests'
    tests.mkdir()
    (tests / 'link').symlink_to('/etc/hostname')
    (tmp_path / 'file').write_text('harness')

    async def main():
        async with opened(task, made[1000]) as sandbox:
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


def test_read_is_not_fooled(task, made):
    reward = '/logs/verifier/reward.txt'

    async def main():
        async with opened(task, made[1000]) as sandbox:
            for trick in (
                *('ln -s /etc/passwd {}', 'mkfifo {}', 'mkdir {}', 'ln -s /dev/zero {}'),
                *('ln -s /proc/1/environ {}', 'head -c 3000000 /dev/zero > {}'),
            ):
                tricked = await sandbox.run(f'rm -rf {reward}; {trick.format(reward)}', SEC)
                assert tricked.exit_code == 0
                with pytest.raises(OSError, match=r'reward\.txt'):
                    await asyncio.wait_for(sandbox.read(reward), SEC)
            await sandbox.run(f'rm -rf {reward}; echo 1 > {reward}; chmod 400 {reward}', SEC)
            return await sandbox.read(reward)

    assert asyncio.run(main()) == b'1\n'


# Start and stop.


def test_stop_leaves_nothing(task, made, used):
    before = left(used)
    used.client.close()  # its pooled connections; the next call opens new ones
    descriptors = len(os.listdir('/proc/self/fd'))

    async def main():
        async with opened(task, made[1000]) as sandbox:
            await sandbox.run('setsid sleep 100 & nohup sleep 100 & trap "" TERM HUP', SEC)
            assert len(left(used)) == len(before) + 1
        await sandbox.stop()  # twice is fine
        assert left(used) == before
        with pytest.raises(SandboxError, match='start'):
            await sandbox.run('true', 1)

    asyncio.run(main())
    used.client.close()
    assert len(os.listdir('/proc/self/fd')) <= descriptors


def test_cancelled_start_leaves_nothing(task, made, used):
    before = left(used)

    async def main():
        for delay in (0.0, 0.03, 0.1, 0.3, 0.5):
            sandbox = docker.DockerSandbox(task, images=made[1000])
            start = asyncio.create_task(sandbox.start())
            await asyncio.sleep(delay)
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError):  # or it was up already
                await start
            await sandbox.stop()

    asyncio.run(main())
    assert left(used) == before


def test_cancelled_command_is_cleared_away(task, made):
    async def main():
        async with opened(task, made[1000]) as sandbox:
            slow = asyncio.create_task(sandbox.run('echo stale; sleep 60', SEC))
            await asyncio.sleep(0.3)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return await sandbox.run('echo fresh; cat /proc/[0-9]*/comm | grep -c sleep', SEC)

    assert asyncio.run(main()).stdout == 'fresh\n0\n'


def test_a_container_that_dies_says_so(task, made, used):
    async def main():
        for command in ('sleep 60', None):
            async with opened(task, made[1000]) as sandbox:
                running = asyncio.create_task(sandbox.run(command, SEC)) if command else None
                await asyncio.sleep(0.2)
                used.client.api.remove_container(sandbox._name, force=True)
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
    sandbox = docker.DockerSandbox(task, images=made)
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


def test_thirty_two_at_once(task, made, used):
    before = left(used)

    async def one(number: int):
        async with opened(task, made[1000]) as sandbox:
            await sandbox.run(f'echo {number} > /app/n; cd /tmp', SEC)
            return (await sandbox.run('cat /app/n; ls /app', SEC)).stdout

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


def test_a_killed_engine(task, made, used, daemon):
    if daemon.process is None:
        pytest.skip('the engine is not ours to kill')
    before = left(used)

    async def main():
        busy = docker.DockerSandbox(task, images=made[1000])
        idle = docker.DockerSandbox(task, images=made[0])
        await asyncio.gather(busy.start(), idle.start())
        running = asyncio.create_task(busy.run('sleep 60', 60))
        await asyncio.sleep(0.3)
        daemon.kill()
        started = time.monotonic()
        for operation in (
            lambda: running,
            lambda: idle.run('true', SEC),
            lambda: idle.read('/etc/hostname'),
            lambda: idle.upload(pathlib.Path('/etc/hostname'), '/app/x'),
            idle.reset,
            docker.DockerSandbox(task, images=made[1000]).start,
        ):
            with pytest.raises(SandboxError) as caught:
                await operation()
            assert '\n' not in str(caught.value)
        await asyncio.gather(busy.stop(), idle.stop())  # logged, not raised
        assert time.monotonic() - started < 15
        await asyncio.to_thread(daemon.start)
        async with opened(task, made[1000]) as again:
            assert (await again.run('echo back', SEC)).stdout == 'back\n'

    asyncio.run(main())
    docker.sweep(used)
    assert soon(lambda: left(used) == before), left(used)
