"""`sandbox.shell = 'fresh'` in local sandboxes: each command is a `bash -c` of its own."""

import asyncio

import pytest

from echo_jax.sandbox import CommandResult, local
from echo_jax.types import Status
from tests.support.sandboxes import SEC, opened


@pytest.fixture
def fresh(session):
    """As `session`, with a fresh shell for each command."""
    return lambda *commands, **options: session(*commands, shell='fresh', **options)


def test_directories_and_variables_do_not_last(fresh):
    results = fresh(
        'cd /tmp; x=5; export y=6; f() { :; }; set -e; umask 077; trap "echo t" EXIT; pwd',
        'pwd; echo "[$x$y]$-"; umask; type f; false; echo on',
    )
    assert results[0] == CommandResult('/tmp\nt\n', '', 0, False)
    assert results[1].stdout == '/app\n[]hBc\n0022\non\n'
    assert 'f: not found' in results[1].stderr


def test_files_and_background_processes_last(fresh):
    results = fresh(
        'echo 1 > f; (while :; do date +%s%N > beat; sleep 0.05; done) > /dev/null 2>&1 & echo up',
        'cat f; sleep 0.3; a=$(cat beat); sleep 0.3; [ "$a" != "$(cat beat)" ] && echo beats',
        'jobs; wait; pkill sleep; true',
    )
    assert results[0].stdout == 'up\n'
    assert results[1].stdout == '1\nbeats\n'
    assert results[2].stdout == ''


def test_exit_codes_and_streams(fresh):
    results = fresh(
        'exit 3', 'exec false', 'kill -9 $$', 'echo out; echo err >&2', 'nope', 'if (', 'cat'
    )
    assert [r.exit_code for r in results] == [3, 1, 137, 0, 127, 2, 0]
    assert (results[3].stdout, results[3].stderr) == ('out\n', 'err\n')
    assert results[4].stderr == 'bash: line 1: nope: command not found\n'
    assert results[6] == CommandResult('', '', 0, False)  # standard input is empty


def test_a_timeout_ends_what_the_command_started(fresh):
    late, left = fresh('echo begun; sleep 61 & sleep 62', 'pgrep -c sleep', timeout=1.0)
    assert late == CommandResult('begun\n', '', -1, True)
    assert left.stdout == '0\n'


def test_start_up_files_and_odd_names(fresh):
    results = fresh(
        'echo "echo hacked" | tee ~/.bashrc ~/.bash_profile > e; export BASH_ENV=/app/e ENV=/app/e',
        'echo one; bash -c "echo two"',
        "printf '%s|' \"it's\" $'a\\nb' 'q\"q' \\$x; echo 'é\n$HOME'",
        'rm -r /app/* /app/.[!.]* 2>/dev/null; cd /; rmdir /app; pwd',
        'pwd',
    )
    assert results[1].stdout == 'one\ntwo\n'
    assert results[2].stdout == 'it\'s|a\nb|q"q|$x|é\n$HOME\n'
    assert results[4].stdout == '/app\n'  # the mount of the working directory cannot be removed


def test_the_shells_differ_only_in_what_lasts(task, backend):
    commands = ['cd /tmp && x=1 && pwd', 'pwd; echo "[$x]"']

    async def main(shell):
        async with opened(local.LocalSandbox(task, backend=backend, shell=shell)) as sandbox:
            return [(await sandbox.run(command, SEC)).stdout for command in commands]

    assert asyncio.run(main('persistent')) == ['/tmp\n', '/tmp\n[1]\n']
    assert asyncio.run(main('fresh')) == ['/tmp\n', '/app\n[]\n']
    with pytest.raises(ValueError, match="expected 'persistent' or 'fresh'"):
        local.LocalSandbox(task, shell='login')


def test_the_verifier_does_not_care(task, backend):
    (task.path / 'tests').mkdir()
    (task.path / 'tests/test.sh').write_text('cat /app/r > /logs/verifier/reward.txt\n')

    async def main():
        sandbox = local.LocalSandbox(task, backend=backend, shell='fresh')
        async with opened(sandbox):
            await sandbox.run('echo 0.5 > r', SEC)
            return await sandbox.verify()

    assert asyncio.run(main())[:2] == (0.5, Status.OK)
