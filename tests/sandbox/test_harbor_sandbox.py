"""The shell that HarborSandbox makes of an environment which runs each command in a new one.

The environment of these tests is `Machine`: real processes in the namespaces of a local sandbox,
behind Harbor's interface. Where Harbor is installed it is a subclass of Harbor's own and made by
Harbor's factory; elsewhere only that part is left out.
"""

import asyncio
import pathlib
import re
import sys
import tempfile

import pytest

from echo_jax.sandbox import CommandResult, SandboxError, harbor, local, shell
from echo_jax.tasks.generate import FAMILIES, generate_tasks
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Status, Task

SEC = 30.0
# A line for each `sleep` that runs; others end meanwhile.
LEFT = 'for f in /proc/[0-9]*/comm; do [ "$(cat $f 2>&1)" = sleep ] && echo left; done; true'
try:
    from harbor.environments.base import BaseEnvironment, ExecResult
    from harbor.environments.capabilities import EnvironmentCapabilities
except ModuleNotFoundError:
    BaseEnvironment = object


class Machine(BaseEnvironment):
    """`exec` is a new shell each time and keeps nothing but files and processes."""

    def __init__(self, environment_dir, network_policy=None, **harbors):
        if BaseEnvironment is not object:
            super().__init__(environment_dir, network_policy=network_policy, **harbors)
        self.sandbox = local.LocalSandbox(Task('machine', pathlib.Path(environment_dir).parent, ''))
        self.calls = 0

    @staticmethod
    def type() -> str:
        return 'machine'

    @property
    def capabilities(self):
        return EnvironmentCapabilities(disable_internet=True)

    def _validate_definition(self):
        pass

    async def start(self, force_build):
        await self.sandbox.start()
        with tempfile.TemporaryDirectory() as empty:  # the agent's user may not make these here
            for folder in ('/tests', '/solution'):
                await self.sandbox.upload(pathlib.Path(empty), folder)

    async def stop(self, delete):
        await self.sandbox.stop()

    async def upload_file(self, source_path, target_path):
        await self.sandbox.upload(pathlib.Path(source_path), target_path)

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None):
        self.calls += 1
        result = await self.sandbox.run(f'({command})', timeout_sec)
        if result.timed_out:
            raise RuntimeError(f'Command timed out after {timeout_sec} seconds')
        if BaseEnvironment is object:
            return result
        return ExecResult(stdout=result.stdout, stderr=result.stderr, return_code=result.exit_code)

    async def upload_dir(self, source_dir, target_dir):
        raise NotImplementedError

    async def download_file(self, source_path, target_path):
        raise NotImplementedError

    async def download_dir(self, source_dir, target_dir):
        raise NotImplementedError


OWN = f'{__name__}:Machine'


def create(task, environment, trial, **limits):
    """Harbor's factory where there is one."""
    if BaseEnvironment is not object:
        return harbor.create_environment(task, environment, trial, **limits)
    return Machine(task.path / 'environment')


@pytest.fixture(autouse=True)
def sandboxes_work():
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def task(tmp_path) -> Task:
    (tmp_path / 'task' / 'environment').mkdir(parents=True)
    return Task('Task_1', tmp_path / 'task', 'do it', env={'NAME': "it's $HOME"})


@pytest.fixture
def session(task):
    """session(commands..., timeout=): their results, then proof that the sandbox still works."""

    def run(*commands: str, timeout: float = SEC) -> list[CommandResult]:
        async def main():
            sandbox = harbor.HarborSandbox(task, environment=OWN, create=create)
            await sandbox.start()
            try:
                results = [await sandbox.run(command, timeout) for command in commands]
                alive = await sandbox.run('echo a*live', SEC)
                assert alive.stdout.endswith('a*live\n'), alive
                return results
            finally:
                await sandbox.stop()

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


def test_upload_and_reset(task, tmp_path):
    folder = tmp_path / 'tests'
    (folder / 'deep').mkdir(parents=True)
    (folder / 'test.sh').write_text('echo here')
    (folder / 'deep' / 'link').symlink_to('../test.sh')
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'bad' / 'out').symlink_to('/etc/passwd')

    async def main():
        sandbox = harbor.HarborSandbox(task, environment=OWN, create=create, output_bytes=1000)
        with pytest.raises(SandboxError, match='not running'):
            await sandbox.run('true', SEC)
        await sandbox.start()
        await sandbox.upload(folder, '/tests')
        await sandbox.upload(folder / 'test.sh', '/app/a b/c')
        seen = await sandbox.run('bash /tests/deep/link; cat "/app/a b/c"', SEC)
        assert seen.stdout == 'here\necho here'
        seen = await sandbox.run('cat /tests/test.sh; ln -s /app /tmp/way', SEC)
        assert seen.stdout == 'echo here'
        with pytest.raises(SandboxError, match='a link lies on the way'):
            await sandbox.upload(folder, '/tmp/way/x')
        with pytest.raises(ValueError, match='leads outside'):
            await sandbox.upload(tmp_path / 'bad', '/tests')
        await sandbox.run('cd /tmp; x=1; (setsid sleep 1000 &)', SEC)
        await sandbox.reset()
        left = await sandbox.run(f'echo "$PWD [$x]"; {LEFT}', SEC)
        assert left.stdout == '/app []\n'
        # A command that nobody waits for any more is killed before the next.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await sandbox.run('sleep 1000', SEC)
        left = await sandbox.run(LEFT, SEC)
        assert left.stdout == ''
        await sandbox.stop()
        await sandbox.stop()
        with pytest.raises(SandboxError, match='not running'):
            await sandbox.run('true', SEC)

    asyncio.run(main())


def test_an_environment_that_fails_is_a_sandbox_error(task, monkeypatch):
    async def start(environment, force_build):
        raise ConnectionError('the cloud\nis gone')

    monkeypatch.setattr(Machine, 'start', start)
    sandbox = harbor.HarborSandbox(task, environment=OWN, create=create)
    with pytest.raises(SandboxError, match='Task_1: Harbor cannot start: the cloud is gone'):
        asyncio.run(sandbox.start())


def test_tasks_are_solved_in_it(tmp_path):
    """The verifier's own scripts, and what two families' solutions do."""
    tasks = load_tasks(generate_tasks(tmp_path / 'set', split='train', count=len(FAMILIES)))[:2]

    async def reward(task, solve):
        sandbox = harbor.HarborSandbox(task, environment=OWN, create=create)
        try:
            await sandbox.start()
            if solve:
                await sandbox.upload(task.path / 'solution', '/solution')
                await sandbox.run('bash /solution/solve.sh', SEC)
            return await sandbox.verify()
        finally:
            await sandbox.stop()

    for task in tasks:
        assert asyncio.run(reward(task, True)) == (1.0, Status.OK)
        assert asyncio.run(reward(task, False)) == (0.0, Status.OK)


def test_what_is_missing_is_one_line():
    if BaseEnvironment is object:
        version = '.'.join(map(str, sys.version_info[:2]))
        with pytest.raises(ValueError, match=rf'pip install harbor, .* this is {version}'):
            harbor.check('docker')
        return
    with pytest.raises(ValueError, match=r"is 'dockr'; expected MODULE:CLASS or one of docker,"):
        harbor.check('dockr')
    harbor.check(OWN)
