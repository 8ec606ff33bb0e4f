"""Every habit of Harbor's (tests/support/habits.py) earns the right reward in each backend.

The oracle runs the task's own solution, the nop nothing. A backend that cannot have a habit refuses
the task by name, instead of a wrong reward.
"""

import asyncio
import os

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

pytestmark = pytest.mark.slow

BACKENDS = ('local', 'docker', 'harbor')
AT_ONCE = 4


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    return habits.write_all(tmp_path_factory.mktemp('habits'), HABITS)


def config_of(backend: str):
    config = base.get_config()
    config.sandbox.backend = backend
    return config


def can_run(habit: Habit, backend: str) -> str:
    """Why the habit is not tried in the backend; '' if it is."""
    if backend == 'local' and not habit.local:
        return 'a sandbox with one account, and without an image, does not have it'
    if habit.builds_online and not os.environ.get('ECHO_TEST_ONLINE'):
        return 'it needs a mirror of Debian: set ECHO_TEST_ONLINE=1'
    return ''


@pytest.fixture(scope='module', params=BACKENDS)
def backend(request) -> str:
    if request.param == 'harbor':
        pytest.importorskip('harbor', reason='Harbor is not installed')
    if request.param != 'local':
        pytest.importorskip('docker', reason='the Docker SDK is not installed')
        daemon = request.getfixturevalue('daemon')
        os.environ['DOCKER_HOST'] = daemon.url
    return request.param


@pytest.fixture(scope='module')
def outcomes(backend, written) -> dict[tuple[str, str], Outcome]:
    """The outcomes of all habits that the backend may run, by (agent, habit)."""
    config = config_of(backend)
    wanted = {habit.name for habit in HABITS if not can_run(habit, backend)}
    tasks = tasksets.choose(load_sources(written), config).tasks
    tasks = [task for task in tasks if task.task_id in wanted]
    found = {}
    try:
        maker = sandbox_maker(config)
    except (SandboxError, ValueError) as error:
        pytest.skip(str(error))
    with maker as make_sandbox:
        for agent in ('oracle', 'nop'):
            run = run_without_model(tasks, make_sandbox, oracle=agent == 'oracle', at_once=AT_ONCE)
            found |= {(agent, outcome.task_id): outcome for outcome in asyncio.run(run)}
    return found


@pytest.mark.parametrize('habit', HABITS, ids=lambda habit: habit.name)
def test_a_habit_of_harbors(backend, outcomes, written, habit):
    if habit.needs and backend != 'harbor':
        left_out = dict(tasksets.choose(load_sources(written), config_of(backend)).left_out)
        assert f"needs {habit.needs}; sandbox.backend='harbor'" in left_out[habit.name]
        return
    if can_run(habit, backend):
        pytest.skip(can_run(habit, backend))
    for agent, reward in (('oracle', habit.oracle), ('nop', habit.nop)):
        got = outcomes[agent, habit.name]
        assert got.status != Status.INFRA_ERROR, got
        assert got.reward == reward, got


def test_the_fixtures_name_what_they_need():
    assert len({habit.name for habit in HABITS}) == len(HABITS) > 60
    assert docker_engine.BASE == habits.BASE


def test_rewards_differ_between_doing_and_not_doing(written):
    """A habit whose nop earns what its oracle earns shows nothing, except for the cheats."""
    same = {habit.name for habit in HABITS if habit.oracle == habit.nop}
    cheats = {'plants-tests', 'writes-rewards', 'bash-env', 'deep-tests', 'logs-link'}
    assert same == {'both-files', *cheats} and written.is_dir()
