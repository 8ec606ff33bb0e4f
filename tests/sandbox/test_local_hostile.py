"""Commands that mean harm in a local sandbox, on both backends. Linux only."""

import asyncio
import os
import pathlib
import re
import subprocess

import pytest

from echo_jax.sandbox import CommandResult, SandboxError, local
from echo_jax.types import Status
from tests.support.processes import comm, descendants, status
from tests.support.sandboxes import SEC, opened

# Out of bounds.


@pytest.mark.slow
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
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
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
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            await sandbox.run('sleep 30 & until [[ $(</proc/$!/comm) == sleep ]]; do :; done', SEC)
            inside = [p for p in descendants(os.getpid()) if comm(p) == 'sleep']
            uids = {int(status(p, 'Uid').split()[0]) for p in inside}
            return uids, {status(p, 'NoNewPrivs') for p in inside}

    uids, no_new_privs = asyncio.run(main())
    assert len(uids) == 1 and 0 not in uids
    assert no_new_privs == {'1'}


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


def test_a_forged_report_is_no_error(session, caplog):
    """Of the shell itself, with an exit code of more digits than Python reads."""
    trap = (
        'set -- $BASH_COMMAND; [ "$2" = printf ] && [ "$6" ] && '
        'exec perl -e "syswrite STDOUT, qq($6 ) . 7 x 5000 . qq( /\\n)"'
    )
    (ended,) = session(f"trap '{trap}' DEBUG")
    assert ended.exit_code == 0 and not caplog.records


def test_children_see_three_descriptors(session):
    (seen,) = session('ls /proc/self/fd | wc -l')
    assert seen.stdout == '4\n'  # 0, 1, 2 and the directory that ls reads


# The verifier's path.

_DAEMON = 'while :; do echo 1 > /logs/verifier/reward.txt; mkdir -p /tests; done'


def test_no_daemon_outlives_reset(task, backend):
    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
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
            gone = await sandbox.run('cat /logs/verifier/reward.txt', SEC)
            assert gone.exit_code == 1 and 'No such file' in gone.stderr
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
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            hidden = await sandbox.run('ls -d /tests; mkdir /tests; ln -s /app /tests', SEC)
            assert hidden.stdout == '' and 'Read-only' in hidden.stderr
            await sandbox.reset()
            await sandbox.upload(tests, '/tests')
            ran = await sandbox.run('bash /tests/test.sh; cat /tests/link; touch /tests/w', SEC)
            assert ran == CommandResult('0.5', '', 0, False)
            return await sandbox.run('cat /logs/verifier/reward.txt', SEC)

    assert asyncio.run(main()).stdout == '0.5'


@pytest.mark.slow
@pytest.mark.parametrize(
    'trick',
    [
        'ln -s /etc/passwd {f}',
        'mkfifo {f}',
        'mkdir {f}',
        'ln -s /proc/1/environ {f}',
        'head -c 3000000 /dev/zero > {f}',
        'ln -s /dev/zero {f}',
        'echo 1 > {f}.txt; ln -s {f}.txt {f}',
    ],
)
def test_the_reward_is_a_regular_file(task, backend, trick):
    reward = '/logs/verifier/reward.txt'
    (task.path / 'tests').mkdir()
    (task.path / 'tests' / 'test.sh').write_text(f'#!/bin/bash\n{trick.format(f=reward)}\n')

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
            tricked = await asyncio.wait_for(sandbox.verify(), SEC)
            (task.path / 'tests' / 'test.sh').write_text(f'#!/bin/bash\necho 1 > {reward}\n')
            return tricked, await sandbox.verify()

    tricked, honest = asyncio.run(main())
    assert tricked[:2] == (0.0, Status.VERIFIER_ERROR)
    assert re.search('no regular file|bytes', tricked.reason)
    assert honest[:2] == (1.0, Status.OK)


def test_links_do_not_lead_uploads_astray(task, backend, tmp_path):
    (tmp_path / 'file').write_text('harness')
    outside = tmp_path / 'directory'
    outside.mkdir()
    (outside / 'link').symlink_to('/etc/hostname')

    async def main():
        async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
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
        async with opened(local.LocalSandbox(task, backend=backend, disk_mb=8)) as sandbox:
            with pytest.raises(SandboxError, match='much to /app/much: tar: much: '):
                await sandbox.upload(tmp_path / 'much', '/app/much')
            with pytest.raises(SandboxError, match='much to /etc/hosts/x: mkdir: '):
                await sandbox.upload(tmp_path / 'much', '/etc/hosts/x')
            await sandbox.run('rm /app/much; mkdir -m 0 /app/shut', SEC)
            await sandbox.upload(tmp_path / 'file', '/app/shut/file')
            return await sandbox.run('chmod 700 /app/shut; cat /app/shut/file; pwd', SEC)

    assert asyncio.run(main()).stdout == 'harness/app\n'
