"""What Harbor's trial makes of a task and of an episode: verdicts, solutions, refusals, failures.

In `Machine`, a local sandbox behind Harbor's interface, as in test_harbor_sandbox.py.
"""

import asyncio

import ml_collections
import pytest

pytest.importorskip('harbor', reason='Harbor needs Python 3.12: pip install harbor')

from harbor.environments.base import ExecResult

from echo_jax.sandbox import CommandResult, SandboxError, harbor, local, shell
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.tasks.generate import FAMILIES, generate_tasks
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Status, Task
from tests.support.harbor_machine import PATH, Machine, machine, write_task
from tests.support.sandboxes import opened

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning'
)  # as in test_harbor_sandbox.py
SEC = 30.0


@pytest.fixture(autouse=True)
def sandboxes_work():
    try:
        local.check()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture
def task(tmp_path) -> Task:
    return write_task(tmp_path / 'Task_1', '[environment.env]\nNAME = "it\'s $HOME"')


async def verdict(task: Task, *commands: str, solve: bool = False):
    async with opened(machine(task, shell='fresh')) as sandbox:
        for command in commands:
            await sandbox.run(command, SEC)
        solved = await sandbox.solve() if solve else None
        return await sandbox.verify(), solved


def test_what_the_tests_say(tmp_path):
    """Every way of a reward, and why there is none."""
    cases = {
        'echo 0.25 >$R.txt; echo said; echo so >&2': (0.25, ''),
        'echo 0 >$R.txt; echo \'{"reward": 0.75, "more": true}\' >$R.json': (0.75, ''),
        'echo \'{"a": 1, "b": 0.5}\' >$R.json': (0.75, ''),
        'echo said': (0, 'RewardFileNotFoundError: No reward file found at /logs/verifier/rew'),
        ': >$R.txt': (0, 'RewardFileEmptyError: '),
        'echo ja >$R.txt': (0, 'VerifierOutputParseError: '),
        'echo nan >$R.txt': (0, 'VerifierOutputParseError: Non-finite reward nan'),
        "echo '{}' >$R.json": (0, 'reward.json holds {}'),
        "echo '[1]' >$R.json": (0, 'VerifierOutputParseError: Non-numeric reward [1] in JSON'),
        'sleep 100': (0, 'VerifierTimeoutError: Verifier execution timed out after 5.0 seconds'),
    }

    async def main():
        for number, (test, (reward, reason)) in enumerate(cases.items()):
            path = tmp_path / f'task-{number}'
            task = write_task(
                path, test=f'R=/logs/verifier/reward; {test}', verifier_timeout_sec=5.0
            )
            found, _ = await verdict(task)
            assert found.reward == reward, (test, found)
            assert found.status == (Status.VERIFIER_ERROR if reason else Status.OK), (test, found)
            assert reason in found.reason and '\n' not in found.reason, (test, found)
            assert not reason or str(tmp_path) not in found.reason
            if 'echo so' in test:
                assert found.output == 'said\nso\n'

    asyncio.run(main())


def test_the_tests_see_what_the_agent_left(tmp_path):
    test = 'kill -0 $(cat /app/pid) && [ -z "$(ls -A /tmp)" ] && echo 1 >/logs/verifier/reward.txt'
    task = write_task(tmp_path / 'server', test=test)
    found, _ = asyncio.run(
        verdict(task, 'echo 1 >/logs/verifier/reward.txt', 'sleep 1000 & echo $! >pid')
    )
    assert found.reward == 1
    found, _ = asyncio.run(verdict(task, 'echo 1 >/logs/verifier/reward.txt'))
    assert found.reward == 0 and found.status == Status.VERIFIER_ERROR


def test_the_solution_is_run_as_the_oracle_does(tmp_path):
    task = write_task(
        tmp_path / 'solved',
        '[solution.env]\nTOLD = "${NONESUCH:-told}"\n[verifier.env]\nWANT = "told"',
        test='[ "$(cat /app/x)" = $WANT ]; echo $((1 - $?)) >/logs/verifier/reward.txt',
        solve='echo "$TOLD" >/app/x; echo tried; exit 4',
    )
    found, solved = asyncio.run(verdict(task, solve=True))
    assert found.reward == 1 and solved == CommandResult('tried\n', '', 4, False)
    found, _ = asyncio.run(verdict(task))
    assert found.reward == 0 and found.status == Status.OK
    late = write_task(tmp_path / 'late', solve='echo tried; sleep 100', agent_timeout_sec=3.0)
    found, solved = asyncio.run(verdict(late, solve=True))
    assert solved.timed_out and solved.exit_code == -1 and found.reward == 1
    (late.path / 'solution' / 'solve.sh').unlink()
    with pytest.raises(ValueError, match=r'late: Solution script not found: .*solve.sh'):
        asyncio.run(verdict(late, solve=True))


def test_steps_have_their_solutions_run_and_no_episode(tmp_path):
    steps = '[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n'
    task = write_task(tmp_path / 'steps', steps, needs_harbor=('[[steps]]',))
    for name in ('one', 'two'):
        step = task.path / 'steps' / name
        write_task(
            step,
            test=f'grep -c {name} /app/done >/logs/verifier/reward.txt',
            solve=f'echo {name} >>/app/done; echo did {name}',
        )
    found, solved = asyncio.run(verdict(task, solve=True))
    assert found.reward == 1 and found.status == Status.OK
    assert solved.stdout == 'did one\n\ndid two\n'
    found, _ = asyncio.run(verdict(task))
    assert found.reward == 0
    with pytest.raises(ValueError, match=r'steps has \[\[steps\]\], which an episode cannot have'):
        asyncio.run(verdict(task, 'true'))


def test_limits_of_the_recipe_replace_the_tasks(tmp_path):
    toml = '[environment]\ncpus = 1\nmemory = "2G"\nstorage_mb = 512\n[verifier]\ntimeout_sec = 7'
    own = {'cpus': 1, 'memory_mb': 2048, 'storage_mb': 512, 'verifier_timeout_sec': 7.0}
    for wanted in ({}, {'cpus': 2, 'memory_mb': 100, 'storage_mb': 9, 'verifier_timeout_sec': 3.0}):
        task = write_task(tmp_path / 'limits', toml, **own | wanted)

        async def main(task=task):
            async with opened(machine(task)) as sandbox:
                trial = sandbox.trial.of_harbor
                config, has = trial.config.environment, trial.agent_environment.task_env_config
                return config, (has.cpus, has.memory_mb, has.storage_mb, trial.verifier_timeout_sec)

        config, has = asyncio.run(main())
        assert has == tuple((own | wanted).values())
        # A separate verifier has limits of its own, which only a recipe's replace.
        assert config.override_memory_mb == wanted.get('memory_mb')


def test_a_task_that_harbor_refuses_is_a_value_error(tmp_path):
    for toml, reason in {
        '[environment]\ngpus = 1': 'GPU',
        '[environment]\nos = "windows"': 'indows',
        'this is no toml': 'Harbor refuses it',
        '[environment.env]\nX = "${NONESUCH}"': 'NONESUCH',
    }.items():
        task = write_task(tmp_path / 'bad', toml)
        with pytest.raises(ValueError, match='bad: Harbor refuses it: ') as caught:
            asyncio.run(verdict(task))
        assert reason in str(caught.value) and '\n' not in str(caught.value)


def test_an_environment_that_fails_is_a_sandbox_error(task, monkeypatch):
    async def start(environment, force_build):
        raise ConnectionError('the cloud\nis gone')

    monkeypatch.setattr(Machine, 'start', start)
    sandbox = machine(task)
    message = 'Task_1: Harbor cannot start it: ConnectionError: the cloud is gone'
    with pytest.raises(SandboxError, match=message):
        asyncio.run(sandbox.start())


@pytest.mark.parametrize(
    'code, answer',
    [
        (1, 'service "main" is not running'),  # by Docker: the container is gone
        (127, 'exec: "bash": executable file not found in $PATH'),  # the agent removed it
    ],
)
@pytest.mark.parametrize('mode', shell.SHELLS)
def test_an_environment_that_answers_no_more(task, mode, code, answer, monkeypatch):
    """Only the agent's own doing costs it the reward."""

    async def exec_(*_, **__):
        return ExecResult(stdout=answer, return_code=code)

    async def main():
        async with opened(machine(task, shell=mode)) as sandbox:
            monkeypatch.setattr(Machine, 'exec', exec_)
            if code == 127:
                assert await sandbox.run('true', SEC) == CommandResult('', answer, 127, False)
                found = await sandbox.verify()
                assert found.status == Status.VERIFIER_ERROR and answer in found.reason
                return
            with pytest.raises(SandboxError, match='Task_1: '):
                await sandbox.run('true', SEC)
            with pytest.raises(SandboxError, match=f'Task_1: the environment is gone: {answer}'):
                await sandbox.verify()

    asyncio.run(main())


def test_an_unhealthy_environment_is_a_sandbox_error(tmp_path):
    toml = '[environment.healthcheck]\ncommand = "false"\nretries = 2\ninterval_sec = 0.1'
    with pytest.raises(SandboxError, match='ill: Harbor cannot start it: HealthcheckError: '):
        asyncio.run(verdict(write_task(tmp_path / 'ill', toml)))


def test_generated_tasks_are_solved_in_it(tmp_path):
    tasks = load_tasks(generate_tasks(tmp_path / 'set', split='train', count=len(FAMILIES)))[:2]
    for task in tasks:
        assert asyncio.run(verdict(task, solve=True))[0].reward == 1
        assert asyncio.run(verdict(task))[0].reward == 0


def test_one_event_loop_after_another(task, monkeypatch):
    """As `train` has, one for each step; Harbor's Docker environment builds under such a lock."""
    lock, start = asyncio.Lock(), Machine.start

    async def start_one_by_one(environment, force_build):
        async with lock:
            await start(environment, force_build)

    monkeypatch.setattr(Machine, 'start', start_one_by_one)

    async def main():
        return await asyncio.gather(verdict(task), verdict(task))

    for _ in range(2):
        assert [found.reward for found, _ in asyncio.run(main())] == [1, 1]


def test_a_sandbox_by_the_recipe(task):
    harbors = {'backend': 'harbor', 'processes': 9, 'shell': 'fresh', 'harbor_environment': PATH}
    with sandbox_maker(ml_collections.ConfigDict({'sandbox': harbors})) as make:

        async def main():
            async with opened(make(task)) as sandbox:
                await sandbox.run('cd /tmp', SEC)
                return (await sandbox.run('pwd', SEC)).stdout

        assert asyncio.run(main()) == '/app\n'


def test_nothing_of_harbors_is_printed(task, capfd):
    (task.path / 'tests' / 'test.sh').write_text('echo printed by the tests')
    asyncio.run(verdict(task, 'echo printed by a command'))
    assert capfd.readouterr() == ('', '')


def test_what_is_missing_is_one_line():
    with pytest.raises(ValueError, match=r"is 'dockr'; expected MODULE:CLASS or one of docker,"):
        harbor.check('dockr')
    with pytest.raises(ValueError, match=r"'nonesuch:A': Failed to import module 'nonesuch'"):
        harbor.check('nonesuch:A')
    harbor.check(PATH)
