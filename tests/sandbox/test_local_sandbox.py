"""Real sandboxes on both backends, against commands that mean harm. Linux only."""

import asyncio
import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from echo_jax import types
from echo_jax.sandbox import CommandResult, SandboxError, local
from echo_jax.sandbox.local import namespaces

ROOT = pathlib.Path(__file__).parents[2]
SEC = 20.0  # for commands that should end by themselves, on a machine that may be busy


@functools.cache
def refusal(backend: str) -> str:
    try:
        local.check(backend)
    except SandboxError as error:
        return str(error)
    return ''


@pytest.fixture(params=namespaces.BACKENDS)
def backend(request) -> str:
    if refusal(request.param):
        pytest.skip(refusal(request.param))
    return request.param


@pytest.fixture
def task(tmp_path) -> types.Task:
    (tmp_path / 'task').mkdir()
    return types.Task('task', tmp_path / 'task', 'do it')


@contextlib.asynccontextmanager
async def opened(task, backend, **limits):
    sandbox = local.LocalSandbox(task, backend=backend, **limits)
    await sandbox.start()
    try:
        yield sandbox
    finally:
        await sandbox.stop()


@pytest.fixture
def session(task, backend):
    """session(commands..., timeout=, **limits): their results, then proof that it still works."""

    def run(*commands: str, timeout: float = SEC, **limits) -> list[CommandResult]:
        async def main():
            async with opened(task, backend, **limits) as sandbox:
                results = [await sandbox.run(command, timeout) for command in commands]
                alive = await sandbox.run('echo a*live; cat /etc/hostname', SEC)
                assert alive.stdout.endswith('a*live\nsandbox\n'), alive
                return results

        return asyncio.run(main())

    return run


def ended(pid: int) -> bool:
    """Whether the process is gone (or only waits to be reaped by someone else)."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return True


def descendants(pid: int) -> set[int]:
    """Host pids of everything below `pid`, sandboxes' processes included."""
    parents = {}
    for entry in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = entry.read_text()
            parents[int(fields.split()[0])] = int(fields.rpartition(')')[2].split()[1])
    found, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grew = found | more, bool(more)
    return found - {pid}


def soon(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# An ordinary shell.


def test_state_lasts_and_streams_stay_apart(session):
    first, second, third, fourth = session(
        'cd /tmp; x=5; f() { echo "f $x"; }; alias ll=ls; set -o pipefail',
        'f; pwd; echo oops >&2; (exit 7)',
        'echo $?',
        'printf "no newline"; printf "\\xff\\x00é" >&2',
    )
    assert first == CommandResult('', '', 0, False)
    assert second == CommandResult('f 5\n/tmp\n', 'oops\n', 7, False)
    assert third.stdout == '7\n'
    assert fourth == CommandResult('no newline', '�\0é', 0, False)


def test_messages_read_like_bash(session):
    # Lines are counted from 1 in every command, however many came before.
    results = session('true', 'echo a\nnope\necho b', 'if (', 'echo "unbalanced', 'nope')
    assert results[1] == CommandResult(
        'a\nb\n', 'bash: line 2: nope: command not found\n', 0, False
    )
    assert [r.exit_code for r in results] == [0, 0, 2, 2, 127]
    assert results[2].stderr == 'bash: eval: line 2: syntax error: unexpected end of file\n'
    assert 'unexpected EOF while looking for matching `"\'' in results[3].stderr
    assert results[4].stderr == 'bash: line 1: nope: command not found\n'


def test_odd_commands(session):
    heredoc, quotes, nul, carriage, empty, stdin, large = session(
        "cat <<'EOF'\n$x `y` \\\nEOF\necho end",
        """printf '%s|' "it's" 'a\\b' "q\\"q" 'é' $'t\\tt'""",
        'echo a\0b',
        'printf %s "a\rb"',
        '',
        'cat; read x; echo "[$x]"; cat /dev/stdin',
        'x=' + 'y' * 300_000 + '; echo ${#x}',
    )
    assert heredoc.stdout == '$x `y` \\\nend\n'
    assert quotes.stdout == 'it\'s|a\\b|q"q|é|t\tt|'
    assert (nul.exit_code, 'NUL' in nul.stderr) == (2, True)
    assert carriage.stdout == 'a\rb'
    assert empty == CommandResult('', '', 0, False)
    assert stdin == CommandResult('[]\n', '', 0, False)
    assert large.stdout == '300000\n'


@pytest.mark.parametrize(
    'command, exit_code',
    [
        ('exit 3', 3),
        ('exec true', 0),
        ('exec nonesuch', 127),
        ('kill -9 $$', 137),
        ('set -e; false', 1),
        ('exec 1>&- 2>&-; echo lost', 1),
        ('exec </dev/null', 0),
        ('for i in $(seq 0 80); do eval "exec $i>&-"; done 2>/dev/null', None),
        ('break; return 4', 2),
        ('trap "" TERM; kill $$', 0),
        ('set -n', None),
        ('exec > /app/moved; echo x', 0),
    ],
)
def test_shell_survives(session, command, exit_code):
    _, result, cwd, fresh = session('cd /tmp', command, 'pwd', 'echo out; echo err >&2', timeout=3)
    assert exit_code is None or result.exit_code == exit_code
    assert not result.stdout
    assert (fresh.stdout, fresh.stderr) == ('out\n', 'err\n')
    assert cwd.stdout == '/tmp\n'  # a fresh shell opens where the last one was


def test_background_job_does_not_hold_the_command(session):
    started = time.monotonic()
    first, second, _ = session('sleep 60 & echo now', 'echo next', 'kill %1')
    assert time.monotonic() - started < 30
    assert (first.stdout, second.stdout) == ('now\n', 'next\n')


def test_same_commands_same_bytes(task, backend):
    commands = [
        'ls /; ls -la --time-style=+ /logs /app /etc /dev',
        'nope',
        'echo $$ $BASHPID; env | sort',
        'if',
        'ps ax',
    ]

    async def main():
        seen = []
        for _ in range(2):
            async with opened(task, backend) as sandbox:
                seen.append([await sandbox.run(c, SEC) for c in commands])
        return seen

    first, second = asyncio.run(main())
    assert first == second
    assert first[2].stdout.count('=') >= 5


# Time and quantity.


def test_timeout_kills_everything_started(session):
    late, where, left = session(
        'cd /tmp; echo begun; setsid sleep 61 & nohup sleep 62 >/dev/null 2>&1 & (sleep 63 &) ;'
        ' trap "" TERM; while :; do sleep 64; done',
        'pwd',
        'ps ax -o args= | grep "sleep 6" | grep -v grep; true',
        timeout=1,
    )
    assert (late.exit_code, late.timed_out, late.stdout) == (-1, True, 'begun\n')
    assert (where.stdout, left.stdout) == ('/app\n', '')


def test_endless_output_is_cut_and_ended(session):
    yes, err, big, huge = session(
        'yes',
        'cat /dev/zero >&2',
        'head -c 3000000 /dev/zero | tr "\\0" x; x=kept',
        'echo $x',
        output_bytes=1 << 20,
    )
    assert yes.stdout == 'y\n' * (1 << 19) and yes.exit_code == 137
    assert len(err.stderr) == 1 << 20 and err.exit_code == 137
    assert big.stdout == 'x' * (1 << 20) and big.exit_code == 0  # finite: only cut
    assert huge.stdout == 'kept\n'


def test_fork_bomb_stays_inside(task, backend):
    async def main():
        async with (
            opened(task, backend, processes=40) as bombed,
            opened(task, backend, processes=40) as other,
        ):
            bomb = asyncio.create_task(bombed.run(':(){ :|:& };: ; while :; do :; done', 2))
            await asyncio.sleep(1)
            assert len(descendants(os.getpid())) < 150
            assert (await other.run('ls / | wc -l', SEC)).exit_code == 0  # it has its own count
            subprocess.run(['true'], check=True)  # as has the host
            assert (await bomb).timed_out
            left = await bombed.run('ps ax | wc -l', SEC)
            assert int(left.stdout) <= 6, left

    asyncio.run(main())


def test_memory_hog_fails_alone(session):
    hog, many = session(
        'tail /dev/zero',
        'for i in 1 2 3; do tail /dev/zero & done; wait; echo over',
        memory_mb=64,
        processes=20,
    )
    assert hog.exit_code == 1 and 'memory exhausted' in hog.stderr
    assert many.stdout == 'over\n'


def test_sandbox_is_the_first_to_run_out_of_memory(session):
    score, lowered = session(
        'cat /proc/self/oom_score_adj', 'echo 0 > /proc/self/oom_score_adj', processes=20
    )
    assert score.stdout == '1000\n'
    if int(_status(os.getpid(), 'CapEff'), 16) >> 24 & 1:  # CAP_SYS_RESOURCE makes it stick
        assert lowered.exit_code == 1 and 'Permission denied' in lowered.stderr


def test_full_disk_is_the_sandboxs_own(session):
    free = os.statvfs('/tmp').f_bavail
    full, again, inodes = session(
        'for d in /app /tmp /logs/agent /dev/shm /root; do cat /dev/zero > $d/fill; done; du -scm '
        '/app /tmp /logs /dev/shm /root | tail -1',
        'rm /app/fill /tmp/fill; echo room > /app/a; cat /app/a',
        'for i in $(seq 300); do : > /tmp/$i; done',
        disk_mb=8,
        files=200,
    )
    assert int(full.stdout.split()[0]) <= 8 and 'No space left' in full.stderr
    assert again.stdout == 'room\n'
    assert 'No space left' in inodes.stderr
    statvfs = os.statvfs('/tmp')
    assert abs(free - statvfs.f_bavail) * statvfs.f_frsize < 1 << 30


def test_limits_are_set(session):
    (limits,) = session(
        'ulimit -u -v -f -t -n -c', processes=30, memory_mb=100, cpu_seconds=9, open_files=50
    )
    numbers = {line.split()[-1] for line in limits.stdout.splitlines()}
    assert {'30', str(100 * 1024), str(256 * 1024), '9', '50', '0'} == numbers


# Out of bounds.


def test_rm_rf_root_spares_the_host(session, tmp_path):
    (tmp_path / 'mine').write_text('here')
    (result, here) = session(
        'timeout 3 rm -rf --no-preserve-root / 2>/dev/null', 'ls -A /app /tmp; ls /usr/bin/ls'
    )
    assert result.exit_code in (1, 124)
    assert '/usr/bin/ls' in here.stdout
    assert (tmp_path / 'mine').read_text() == 'here' and pathlib.Path('/usr/bin').is_dir()


def test_no_network(session):
    interfaces, loopback, out, unix = session(
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '",
        'echo > /dev/tcp/127.0.0.1/22',
        'echo > /dev/tcp/192.0.2.1/80',
        'cat /proc/net/unix | wc -l',
    )
    assert interfaces.stdout == 'lo\n'
    assert loopback.exit_code == 1 and 'Connection refused' in loopback.stderr
    assert out.exit_code == 1 and 'unreachable' in out.stderr
    assert int(unix.stdout) < 10  # abstract sockets of the host are not here


def test_host_files_and_environment_are_absent(task, backend, monkeypatch, tmp_path):
    monkeypatch.setenv('SECRET_TOKEN', 'hunter2')
    secret = tmp_path / 'secret'
    secret.write_text('hunter2')

    async def main():
        async with opened(task, backend) as sandbox:
            return [
                await sandbox.run(command, SEC)
                for command in (
                    'env; cat /proc/*/environ /proc/*/cmdline | tr "\\0" "\\n"',
                    f'cat {secret} /proc/1/root{secret}; ls -A /home /work /srv /opt /root /var/*',
                    'cat /etc/shadow /etc/sudoers; cut -d: -f1 /etc/passwd | tr "\\n" .',
                    'cut -d" " -f5 /proc/self/mountinfo | sort',
                )
            ]

    environ, files, accounts, mounts = asyncio.run(main())
    assert 'hunter2' not in environ.stdout and 'SECRET' not in environ.stdout
    assert 'PATH=' in environ.stdout
    assert 'hunter2' not in files.stdout and files.stdout.split('\n\n')
    assert accounts.stdout == 'root.agent.' and accounts.exit_code == 0
    assert str(tmp_path) not in mounts.stdout
    assert not {'/home', '/opt', '/srv', '/var', '/sys'} & set(mounts.stdout.split())


def test_no_capabilities_and_no_way_to_get_any(session):
    status, users, mounted, setuid, owner = session(
        'grep -E "^(Cap|NoNewPrivs)" /proc/self/status | cut -f2 | sort -u',
        'unshare --user --map-root-user id; unshare --mount true; mount -t tmpfs t /tmp; echo $?',
        'mount -o remount,rw / ; touch /x /tests; mkdir /solution; ls /x /tests /solution',
        'find / -xdev -perm -4000 -exec {} --help \\; >/dev/null 2>&1; id -u',
        'stat -c %u /app /usr /proc/sys/kernel/hostname',
    )
    assert status.stdout == '0000000000000000\n1\n'
    assert users.stdout.strip() not in ('0', '') and 'uid=' not in users.stdout
    assert mounted.stdout == ''
    assert setuid.stdout == '1000\n'
    assert owner.stdout == '1000\n65534\n65534\n'


def test_host_uid_is_not_root(task, backend):
    async def main():
        async with opened(task, backend) as sandbox:
            await sandbox.run('sleep 30 & sleep 0.2', SEC)
            inside = [p for p in descendants(os.getpid()) if _comm(p) == 'sleep']
            uids = {int(_status(p, 'Uid').split()[0]) for p in inside}
            return uids, {_status(p, 'NoNewPrivs') for p in inside}

    uids, no_new_privs = asyncio.run(main())
    assert len(uids) == 1 and 0 not in uids
    assert no_new_privs == {'1'}


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f'/proc/{pid}/comm').read_text().strip()
    return ''


def _status(pid: int, key: str) -> str:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
    return next(line.split(':')[1].strip() for line in lines if line.startswith(key + ':'))


def test_devices_and_proc(session):
    devices, proc, disks, tty = session(
        'ls /dev | tr "\\n" " "; head -c 4 /dev/zero | wc -c',
        'for f in /proc/sys/kernel/core_pattern /proc/sys/vm/drop_caches /proc/sysrq-trigger '
        '/proc/sys/kernel/hostname /proc/sys/user/max_user_namespaces /proc/1/oom_score_adj; do '
        '(echo b > $f) 2>/dev/null && echo wrote $f; done; head -c1 /proc/kcore /proc/kmsg; true',
        'mknod /tmp/disk b 8 0; cat /dev/mem /dev/kmsg /proc/1/mem; ls -l /proc/1/fd/0',
        'tty; (: </dev/tty) && echo has a terminal',
    )
    names = 'fd full null random shm stderr stdin stdout urandom zero 4'
    assert devices.stdout == f'{names}\n'
    assert proc.stdout == ''
    assert disks.stdout.count('->') == 0 and 'Operation not permitted' in disks.stderr
    assert tty.stdout == 'not a tty\n'


def test_kill_minus_one_and_tracing_the_supervisor(session):
    bystander = subprocess.Popen(['sleep', '60'])
    try:
        killed, supervisor, attach = session(
            'sh -c "kill -9 -1"; kill -9 -1; echo still',
            'kill -9 1; kill -TERM 1; kill -STOP 1; kill -CHLD 1; ps -o pid= -p 1',
            'cat /proc/1/environ /proc/1/maps; readlink /proc/1/exe /proc/1/cwd /proc/1/fd/0; true',
        )
        assert killed.exit_code in (0, 137)
        assert supervisor.stdout.strip() == '1'
        assert attach.stdout == ''
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_command_cannot_report_for_another(session):
    # A subshell keeps the report's socket; only the shell itself may write to it.
    daemon, after, forged, last = session(
        '(while sleep 0.05; do for i in {3..20}; do echo "0 0 /" >&$i; done; done) 2>/dev/null &',
        'sleep 0.3; echo true words; false',
        'for i in {3..20}; do echo "x 0 /" >&$i; done 2>/dev/null; sleep 0.2; false',
        'kill $!; wait $! 2>/dev/null; echo mine',
    )
    assert daemon.exit_code == 0
    assert after.exit_code == 1 and 'true words\n' in after.stdout
    assert forged.exit_code == 1
    assert last.exit_code == 0 and 'mine\n' in last.stdout


def test_children_see_three_descriptors(session):
    (seen,) = session('ls /proc/self/fd | wc -l')
    assert seen.stdout == '4\n'  # 0, 1, 2 and the directory that ls reads


# The verifier's path.

_DAEMON = 'while :; do echo 1 > /logs/verifier/reward.txt; mkdir -p /tests; done'


def test_no_daemon_outlives_reset(task, backend):
    async def main():
        async with opened(task, backend) as sandbox:
            await sandbox.run(f"setsid nohup bash -c '{_DAEMON}' >/dev/null 2>&1 &", SEC)
            await sandbox.run('ls() { echo fake; }; PATH=/app; cd /tmp; trap "echo t" DEBUG', SEC)
            await sandbox.run(
                'echo "echo evil" > /root/.bashrc; export BASH_ENV=/root/.bashrc', SEC
            )
            await sandbox.reset()
            cleared = await sandbox.run(
                'rm -rf /logs/verifier/reward.*; pwd; bash -c "echo ok"', SEC
            )
            assert cleared == CommandResult('/app\nok\n', '', 0, False)
            await asyncio.sleep(0.2)
            with pytest.raises(FileNotFoundError):
                await sandbox.read('/logs/verifier/reward.txt')
            processes = await sandbox.run('ps ax -o args=', SEC)
            assert processes.stdout.splitlines()[1:] == [
                'bash --norc --noprofile -s',
                'ps ax -o args=',
            ]

    asyncio.run(main())


def test_verifier_tests_run_and_the_reward_is_read(task, backend, tmp_path):
    tests = tmp_path / 'tests'
    (tests / 'data').mkdir(parents=True)
    (tests / 'test.sh').write_text('#!/bin/bash\ncat /tests/data/x > /logs/verifier/reward.txt\n')
    (tests / 'test.sh').chmod(0o600)
    (tests / 'data' / 'x').write_text('0.5')
    (tests / 'link').symlink_to('data/x')

    async def main():
        async with opened(task, backend) as sandbox:
            hidden = await sandbox.run('ls -d /tests; mkdir /tests; ln -s /app /tests', SEC)
            assert hidden.stdout == '' and 'Read-only' in hidden.stderr
            await sandbox.reset()
            await sandbox.upload(tests, '/tests')
            ran = await sandbox.run('bash /tests/test.sh; cat /tests/link; touch /tests/w', SEC)
            assert ran == CommandResult('0.5', '', 0, False)
            return await sandbox.read('/logs/verifier/reward.txt')

    assert asyncio.run(main()) == b'0.5'


@pytest.mark.parametrize(
    'trick',
    [
        'ln -s /etc/passwd {f}',
        'mkfifo {f}',
        'mkdir {f}',
        'ln -s /proc/1/environ {f}',
        'head -c 3000000 /dev/zero > {f}',
        'ln -s /dev/zero {f}',
    ],
)
def test_read_is_not_fooled(task, backend, trick):
    async def main():
        async with opened(task, backend) as sandbox:
            reward = '/logs/verifier/reward.txt'
            made = await sandbox.run(trick.format(f=reward), SEC)
            assert made.exit_code == 0
            with pytest.raises(OSError, match=r'reward\.txt'):
                await asyncio.wait_for(sandbox.read(reward), SEC)
            secret = await sandbox.run(f'rm -rf {reward}; echo 1 > {reward}; chmod 0 {reward}', SEC)
            assert secret.exit_code == 0
            return await sandbox.read(reward)

    assert asyncio.run(main()) == b'1\n'


def test_links_do_not_lead_uploads_astray(task, backend, tmp_path):
    (tmp_path / 'file').write_text('harness')
    outside = tmp_path / 'directory'
    outside.mkdir()
    (outside / 'link').symlink_to('/etc/hostname')

    async def main():
        async with opened(task, backend) as sandbox:
            await sandbox.run(
                'rm -r /logs/agent; ln -s /etc /logs/agent; ln -s /etc/hosts /app/f', SEC
            )
            for target in ('/logs/agent/hostname', '/logs/agent/ssl/certs/file'):
                with pytest.raises(SandboxError, match='a link lies on the way'):
                    await sandbox.upload(tmp_path / 'file', target)
            with pytest.raises(ValueError, match='leads outside'):
                await sandbox.upload(outside, '/app/outside')
            await sandbox.upload(tmp_path / 'file', '/app/f')  # replaces the link
            await sandbox.upload(tmp_path / 'file', "/app/new dir/it's\n%b")
            return await sandbox.run(
                'cat /app/f /etc/hostname /app/new*/*; grep -c harness /etc/hosts', SEC
            )

    assert asyncio.run(main()).stdout == 'harnesssandbox\nharness0\n'


def test_an_upload_that_fails_leaves_the_sandbox_in_order(task, backend, tmp_path):
    (tmp_path / 'much').write_bytes(bytes(range(256)) * (12 << 12))
    (tmp_path / 'file').write_text('harness')

    async def main():
        async with opened(task, backend, disk_mb=8) as sandbox:
            with pytest.raises(SandboxError, match='much to /app/much: tar: much: '):
                await sandbox.upload(tmp_path / 'much', '/app/much')
            with pytest.raises(SandboxError, match='much to /etc/hosts/x: mkdir: '):
                await sandbox.upload(tmp_path / 'much', '/etc/hosts/x')
            await sandbox.run('rm /app/much; mkdir -m 0 /app/shut', SEC)
            await sandbox.upload(tmp_path / 'file', '/app/shut/file')
            return await sandbox.run('chmod 700 /app/shut; cat /app/shut/file; pwd', SEC)

    assert asyncio.run(main()).stdout == 'harness/app\n'


# Start and stop.


def test_dockerfile_is_followed(task, backend):
    environment = task.path / 'environment'
    (environment / 'src').mkdir(parents=True)
    (environment / 'src' / 'a.txt').write_text('A')
    (environment / 'b.txt').write_text('B')
    (environment / 'Dockerfile').write_text(
        '# a comment\nFROM debian:bookworm\nWORKDIR /srv/box\nENV NAME=value OTHER="two words"\n'
        'COPY src/ ./src\nCOPY b.txt $NAME.txt\n'
        'RUN cat src/a.txt value.txt > made \\\n && echo $OTHER >> made && export LOST=1\n'
        'RUN ["touch", "with space"]\n'
    )

    async def main():
        async with opened(task, backend) as sandbox:
            return await sandbox.run(
                'pwd; ls -1; cat made; echo $NAME $LOST.; echo ok > w; cat w', SEC
            )

    expected = '/srv/box\nmade\nsrc\nvalue.txt\nwith space\nABtwo words\nvalue .\nok\n'
    assert asyncio.run(main()) == CommandResult(expected, '', 0, False)


@pytest.mark.parametrize(
    'line, error, message',
    [
        ('ADD a /b', ValueError, 'ADD is not followed'),
        ('USER root', ValueError, 'USER is not followed'),
        ('COPY ../../x /app/', ValueError, 'leads outside'),
        ('COPY link /app/', ValueError, 'leads outside'),
        ('COPY nothing /app/', ValueError, 'no such file'),
        ('COPY --from=other a /b', ValueError, 'no options'),
        ('RUN false', SandboxError, "RUN 'false' ended with 1"),
    ],
)
def test_dockerfile_refusals(task, backend, line, error, message):
    environment = task.path / 'environment'
    environment.mkdir()
    (environment / 'Dockerfile').write_text(f'FROM x\n{line}\n')
    (environment / 'link').symlink_to('/etc/hostname')
    before = descendants(os.getpid())

    async def main():
        async with opened(task, backend):
            pass

    with pytest.raises(error, match=message) as caught:
        asyncio.run(main())
    assert '\n' not in str(caught.value)
    assert soon(lambda: descendants(os.getpid()) <= before)


def test_task_env_and_workdir(backend, tmp_path):
    task = types.Task('t', tmp_path, 'x', workdir='/data/in', env={'A': "it's\n2"})

    async def main():
        async with opened(task, backend) as sandbox:
            first = await sandbox.run('pwd; echo "$A"; touch here', SEC)
            await sandbox.reset()
            return first, await sandbox.run('ls; echo "$A" | wc -l', SEC)

    first, second = asyncio.run(main())
    assert first == CommandResult("/data/in\nit's\n2\n", '', 0, False)
    assert second.stdout == 'here\n2\n'


def test_stop_leaves_nothing(task, backend):
    before = descendants(os.getpid()), pathlib.Path('/proc/self/mountinfo').read_text()
    files = set(os.listdir('/tmp')), len(os.listdir('/proc/self/fd'))

    async def main():
        async with opened(task, backend) as sandbox:
            await sandbox.run('setsid sleep 100 & nohup sleep 100 & trap "" TERM HUP', SEC)
            assert descendants(os.getpid()) > before[0]
        await sandbox.stop()  # twice is fine
        with pytest.raises(SandboxError, match='start'):
            await sandbox.run('true', 1)

    asyncio.run(main())
    assert descendants(os.getpid()) == before[0]
    assert pathlib.Path('/proc/self/mountinfo').read_text() == before[1]
    assert len(os.listdir('/proc/self/fd')) == files[1]
    assert not {name for name in set(os.listdir('/tmp')) - files[0] if 'sandbox' in name}


def test_cancelled_command_is_cleared_away(task, backend):
    async def main():
        async with opened(task, backend) as sandbox:
            slow = asyncio.create_task(sandbox.run('echo stale; sleep 60', SEC))
            await asyncio.sleep(0.3)
            slow.cancel()
            with pytest.raises(asyncio.CancelledError):
                await slow
            return await sandbox.run('echo fresh; ps ax | grep -c "[s]leep 60"', SEC)

    assert asyncio.run(main()).stdout == 'fresh\n0\n'


def test_a_dead_sandbox_says_so(task, backend):
    async def main(command: str | None):
        async with opened(task, backend) as sandbox:
            inits = [p for p in descendants(os.getpid()) if _status(p, 'NSpid').split()[-1] == '1']
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
        [sys.executable, '-c', _PARENT, backend, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert parent.stdout.readline() == b'up\n'
        inside = descendants(parent.pid)
        assert len(inside) >= 4
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    assert soon(lambda: all(ended(pid) for pid in inside)), [_comm(pid) for pid in inside]


def marked(mark: str) -> list[str]:
    """The processes that inherited `mark` in their PATH, wherever their parent went."""
    found = []
    for entry in pathlib.Path('/proc').glob('[0-9]*'):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / 'environ').read_bytes() and not ended(int(entry.name)):
                found.append((entry / 'cmdline').read_text().replace('\0', ' ')[:80])
    return found


_SUICIDE = _PARENT.replace(
    'async def main():',
    'async def main():\n    asyncio.get_running_loop().call_later('
    'float(sys.argv[3]), os.kill, os.getpid(), 9)',
).replace('import asyncio', 'import asyncio, os')


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

    async def main():
        for number in range(60):  # a moment later each time
            box = local.LocalSandbox(task, backend=backend)
            start = asyncio.create_task(box.start())
            await asyncio.sleep(number * 0.0002)
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start

    asyncio.run(main())
    assert soon(lambda: not marked(f'{tmp_path}/mark')), marked(f'{tmp_path}/mark')


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
        worker = next(p for p in descendants(parent.pid) if _comm(p) == _comm(parent.pid))
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
        async with opened(task, backend) as sandbox:
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
