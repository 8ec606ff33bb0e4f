"""Every habit of Harbor's (tests/support/habits.py) earns the right reward in each backend.

The oracle runs the task's own solution, the nop nothing. A backend that cannot have a habit refuses
the task by name, instead of a wrong reward.
"""

import asyncio
import os
from collections.abc import Iterator

import pytest

from configs import base
from echo_jax.run import tasksets
from echo_jax.run.oracle import Outcome, run_without_model
from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.tasks.sources import load_sources
from echo_jax.types import Status
from tests.support import docker_engine, habits
from tests.support.habits import Habit
from tests.support.harbor_habits import HABITS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings('ignore::DeprecationWarning'),  # Harbor's, of old names in a task
]

BACKENDS = ('local', 'docker', 'harbor')


def config_of(backend: str):
    config = base.get_config()
    config.sandbox.backend = backend
    return config


def why_not(habit: Habit, backend: str) -> str:
    """Why the habit is not tried in the backend; '' if it is."""
    if backend == 'local' and not habit.local:
        return 'a sandbox with one account, and without an image, does not have it'
    if habit.builds_online and not os.environ.get('ECHO_TEST_ONLINE'):
        return 'it needs a mirror of Debian: set ECHO_TEST_ONLINE=1'
    return ''


@pytest.fixture(scope='module', params=BACKENDS)
def backend(request) -> Iterator[str]:
    if request.param == 'harbor':
        pytest.importorskip('harbor', reason='Harbor is not installed')
    if request.param != 'local':
        pytest.importorskip('docker', reason='the Docker SDK is not installed')
        daemon = request.getfixturevalue('daemon')
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('DOCKER_HOST', daemon.url)
            yield request.param
    else:
        yield request.param


@pytest.fixture(scope='module')
def make_sandbox(backend):
    try:
        maker = sandbox_maker(config_of(backend))
    except (SandboxError, ValueError) as error:
        pytest.skip(str(error))
    with maker:
        yield maker


@pytest.mark.parametrize('habit', HABITS, ids=lambda habit: habit.name)
def test_a_habit_of_harbors(backend, make_sandbox, tmp_path, habit):
    if why_not(habit, backend):
        pytest.skip(why_not(habit, backend))
    # Harbor forbids a network by images of a registry, which a test does not reach.
    habits.write(habit, tmp_path, network=backend == 'harbor')
    sets = load_sources(tmp_path)
    if habit.needs and backend != 'harbor':
        with pytest.raises(ValueError) as error:
            tasksets.choose(sets, config_of(backend))
        assert f"needs {habit.needs}; sandbox.backend='harbor'" in str(error.value)
        return
    tasks = tasksets.choose(sets, config_of(backend)).tasks

    async def run(agent: str) -> Outcome:
        is_oracle = agent == 'oracle'
        (outcome,) = await run_without_model(tasks, make_sandbox, oracle=is_oracle, at_once=1)
        return outcome

    async def run_both() -> list[Outcome]:
        return await asyncio.gather(run('oracle'), run('nop'))

    for got, reward in zip(asyncio.run(run_both()), (habit.oracle, habit.nop), strict=True):
        assert got.status != Status.INFRA_ERROR, got
        assert got.reward == reward, got


def test_the_fixtures_name_what_they_need():
    assert len({habit.name for habit in HABITS}) == len(HABITS) > 60
    assert docker_engine.BASE == habits.BASE


def test_rewards_differ_between_doing_and_not_doing():
    """A habit whose nop earns what its oracle earns shows nothing, except for the cheats."""
    same = {habit.name for habit in HABITS if habit.oracle == habit.nop}
    cheats = {'plants-tests', 'writes-rewards', 'bash-env', 'deep-tests', 'logs-link'}
    assert same == {'both-files', *cheats}
