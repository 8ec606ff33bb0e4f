"""The shell of a local sandbox on both backends, and its limits in time and size. Linux only."""

import asyncio
import os
import subprocess
import time

import pytest

from echo_jax.sandbox import CommandResult, local
from tests.support.processes import descendants, status
from tests.support.sandboxes import SEC, opened

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


@pytest.mark.slow
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
            async with opened(local.LocalSandbox(task, backend=backend)) as sandbox:
                seen.append([await sandbox.run(c, SEC) for c in commands])
        return seen

    first, second = asyncio.run(main())
    assert first == second
    assert first[2].stdout.count('=') >= 5


# Time and quantity.


@pytest.mark.slow
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


@pytest.mark.slow
def test_fork_bomb_stays_inside(task, backend):
    async def main():
        async with (
            opened(local.LocalSandbox(task, backend=backend, processes=40)) as bombed,
            opened(local.LocalSandbox(task, backend=backend, processes=40)) as other,
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
    if int(status(os.getpid(), 'CapEff'), 16) >> 24 & 1:  # CAP_SYS_RESOURCE makes it stick
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
