"""The shells that HarborSandbox makes of an environment which runs each command in a new one.

The environment of these tests is `Machine`: real processes in the namespaces of a local sandbox,
behind Harbor's interface. All else is Harbor's own.
"""

import asyncio
import pathlib
import re

import pytest

pytest.importorskip('harbor', reason='Harbor needs Python 3.12: pip install harbor')

from echo_jax.sandbox import CommandResult, SandboxError, local, shell
from echo_jax.types import Task
from tests.support.harbor_machine import Machine, machine, write_task
from tests.support.sandboxes import opened

# Harbor warns of old keys in tasks, and of its own code.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')
SEC = 30.0
# A line for each `sleep` that runs; others end meanwhile.
LEFT = 'for f in /proc/[0-9]*/comm; do [ "$(cat $f 2>&1)" = sleep ] && echo left; done; true'


@pytest.fixture(autouse=True)
def sandboxes_work():
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def task(tmp_path) -> Task:
    return write_task(tmp_path / 'Task_1', '[environment.env]\nNAME = "it\'s $HOME"')


@pytest.fixture
def session(task):
    """session(commands..., timeout=): their results, then proof that the sandbox still works."""

    def run(*commands: str, timeout: float = SEC, mode: str = 'persistent') -> list[CommandResult]:
        async def main():
            async with opened(machine(task, shell=mode)) as sandbox:
                results = [await sandbox.run(command, timeout) for command in commands]
                alive = await sandbox.run('echo a*live', SEC)
                assert alive.stdout.endswith('a*live\n'), alive
                return results

        return asyncio.run(main())

    return run


def test_one_shell_for_all_commands(session):
    results = session(
        'cd /tmp; x=42; export y="a b"; f() { echo "f $1"; }; set -o pipefail; sleep 100 &',
        'echo "$PWD $x $y $NAME"; f 1; jobs; false | true; echo $?',
        "printf 'no newline'; echo oops >&2; (exit 3)",
        'echo $?; cat; printf "\\377"',
        'echo "unbalanced',
    )
    first, second, third, fourth, fifth = results
    assert first == CommandResult('', '', 0, False)
    lines = second.stdout.splitlines()
    assert lines[:2] == ["/tmp 42 a b it's $HOME", 'f 1'] and lines[-1] == '1'
    assert re.fullmatch(r'\[1\]\+  Running +sleep 100 &', lines[2])
    assert third == CommandResult('no newline', 'oops\n', 3, False)
    assert fourth == CommandResult('3\n\N{REPLACEMENT CHARACTER}', '', 0, False)  # stdin is empty
    assert fifth.exit_code == 2 or 'unexpected EOF' in fifth.stderr


@pytest.mark.slow
def test_a_timeout_kills_all_and_keeps_the_directory(session):
    results = session(
        'cd /tmp; x=1; (setsid sleep 1000 &)',
        'sleep 1001 & echo begun; sleep 1002',
        f'echo "$PWD [$x]"; {LEFT}',
        timeout=2.0,
    )
    assert results[1] == CommandResult('begun\n', '', -1, True)
    assert results[2] == CommandResult('/tmp []\n', '', 0, False)


def test_a_shell_that_ends(session):
    results = session(
        'cd /tmp; sleep 1000 &',
        'exit 7',
        f'echo $PWD; {LEFT}',
        'kill -9 $$',
        'exec true',
        'kill -9 -1',
    )
    assert [r.exit_code for r in results] == [0, 7, 0, 137, 0, 137]
    assert results[2].stdout == '/tmp\nleft\n'  # what ran in the background lives on


def test_endless_output_ends(session, monkeypatch):
    monkeypatch.setattr(shell, 'DISCARD_BYTES', 1 << 20)
    (result,) = session('yes | head -c 4000000; sleep 100')  # yes alone may fill the disk first
    assert result.exit_code == 137 and not result.timed_out
    assert result.stdout == 'y\n' * (1 << 17)  # output_bytes of it


@pytest.mark.slow
def test_hostile_commands(session):
    results = session(
        'rm -rf /tmp/.echo_jax-*; echo gone',
        'exec >/dev/null 2>&1; echo to the file',
        'trap "" TERM INT HUP; while :; do sleep 100; done',
        'bomb() { bomb | bomb & }; bomb; sleep 100',
        'echo a\0b',
        'echo ' + 'x' * 100_000,
        timeout=3.0,
    )
    assert results[2].timed_out
    assert results[3].exit_code in (-1, 137)  # the driver may find no room to wait in
    assert results[4].exit_code == 2 and 'NUL' in results[4].stderr
    assert results[5].exit_code == 126


@pytest.mark.parametrize(
    ('mode', 'command'),
    [
        ('persistent', 'echo dead x >done; sleep 100'),
        ('persistent', 'echo dead $(printf %05000d 7) >done; sleep 100'),
        ('fresh', 'echo code x >why'),
        ('fresh', 'echo flood \u00b2 >why'),  # a digit, but no number
    ],
)
def test_a_forged_report_ends_the_command(session, mode, command):
    (result,) = session(f'cd /tmp/.echo_jax-*; {command}', mode=mode)
    assert result.exit_code == 137 and not result.timed_out


def test_fresh_shells(session):
    """A new `bash -c` for each command: files and processes last, and nothing else does."""
    results = session(
        'cd /tmp; x=42; echo kept >/app/file; sleep 1000 & (setsid sleep 1000 &)',
        'echo "$PWD [$x] $NAME $SHLVL"; env | grep ECHO_JAX; cat file; jobs; set -e; false',
        f"printf 'no newline'; echo oops >&2; cat; {LEFT}; exit 3",
        'trap "echo caught; exit 5" INT; kill -INT $$; sleep 1',
        "cat <<'EOF'\n$x \nEOF\n\n",
        'echo "unbalanced',
        'kill -9 $$',
        'echo a\0b',
        'echo ' + 'x' * 100_000,
        mode='fresh',
    )
    assert results[0] == CommandResult('', '', 0, False)
    assert results[1] == CommandResult("/app [] it's $HOME 1\nkept\n", '', 1, False)
    assert results[2] == CommandResult('no newlineleft\nleft\n', 'oops\n', 3, False)
    assert results[3] == CommandResult('caught\n', '', 5, False)
    assert results[4] == CommandResult('$x \n', '', 0, False)
    assert results[5].exit_code == 2 and 'unexpected EOF' in results[5].stderr
    assert results[6].exit_code == 137
    assert results[7].exit_code == 2 and 'NUL' in results[7].stderr
    assert results[8].exit_code == 126


def test_a_fresh_shell_that_runs_out_of_time_ends_with_what_it_began(session):
    results = session(
        'sleep 1000 &',
        '(setsid sleep 1001 &); sleep 1002 & echo begun; trap "" TERM; sleep 1003',
        LEFT,
        'kill -9 -1; echo not reached',
        'cat',
        mode='fresh',
        timeout=3.0,
    )
    assert results[1] == CommandResult('begun\n', '', -1, True)
    assert results[2].stdout == 'left\n'  # what an earlier command began
    assert results[3].exit_code == 137
    assert results[4] == CommandResult('', '', 0, False)


def test_endless_output_of_a_fresh_shell_ends(session, monkeypatch):
    monkeypatch.setattr(shell, 'DISCARD_BYTES', 1 << 20)
    (result,) = session('yes | head -c 4000000; sleep 100', mode='fresh')
    assert result == CommandResult('y\n' * (1 << 17), '', 137, False)


def test_a_sandbox_from_start_to_stop(task, tmp_path):
    folder = tmp_path / 'files'
    (folder / 'deep').mkdir(parents=True)
    (folder / 'deep' / 'a').write_text('echo here')

    async def main():
        sandbox = machine(task, output_bytes=1000)
        with pytest.raises(SandboxError, match='not running'):
            await sandbox.run('true', SEC)
        await sandbox.start()
        await sandbox.upload(folder, '/app/files')
        await sandbox.upload(folder / 'deep' / 'a', '/app/b')
        seen = await sandbox.run('bash files/deep/a; cat b', SEC)
        assert seen.stdout == 'here\necho here'
        # A command that nobody waits for any more is killed before the next.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await sandbox.run('sleep 1000', SEC)
        assert (await sandbox.run(LEFT, SEC)).stdout == ''
        assert (await sandbox.verify()).reward == 1
        with pytest.raises(SandboxError, match='not running'):
            await sandbox.run('true', SEC)
        await sandbox.stop()
        await sandbox.stop()
        with pytest.raises(SandboxError, match='not running'):
            await sandbox.verify()

    asyncio.run(main())


@pytest.mark.parametrize('mode', shell.SHELLS)
def test_an_episode_that_is_dropped_leaves_nothing(task, mode, monkeypatch):
    """Whether while the environment starts, a command runs or the tests do."""
    stopped = []
    stop = Machine.stop

    async def stop_and_note(environment, delete):
        stopped.append(delete)
        await stop(environment, delete)

    monkeypatch.setattr(Machine, 'stop', stop_and_note)
    (task.path / 'tests' / 'test.sh').write_text('sleep 1000')

    async def begin(sandbox, parts):
        await sandbox.start()
        if 'command' in parts:
            await sandbox.run('sleep 1000', 1000)
        if 'tests' in parts:
            await sandbox.verify()

    async def main():
        for seconds, parts in ((0.3, ''), (4, 'command'), (6, 'tests')):
            sandbox = machine(task, shell=mode)
            folder = None
            try:
                async with asyncio.timeout(seconds):
                    await begin(sandbox, parts)
            except TimeoutError:
                pass
            folder = sandbox.logs and pathlib.Path(sandbox.logs.name)
            await sandbox.stop()
            assert stopped.pop() is True and stopped == []
            assert folder is None or not folder.exists()
        assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []

    asyncio.run(main())
