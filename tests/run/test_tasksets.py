"""Which tasks a run has: those that can be read and that its sandboxes have, by its limits."""

import asyncio
import logging

import pytest

from configs import tiny
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.run import tasksets
from echo_jax.run.rollout_worker import RolloutWorker
from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueGroups
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import generate_tasks
from echo_jax.types import Status
from tests.support.episodes import DONE
from tests.support.task_folders import write

LIMITS = '[agent]\ntimeout_sec = 7\n[environment]\nmemory_mb = 700\ncpus = 3\n'


def recipe(tmp_path, **sandbox):
    config = tiny.get_config()
    config.tasks.train = str(tmp_path / 'set')
    config.sandbox.update(dict(dict.fromkeys(tasksets.LIMITS), **sandbox))
    return config


def test_the_recipes_limits_take_the_place_of_the_tasks(tmp_path):
    write(tmp_path / 'set' / 'a', LIMITS)
    (task,), _ = tasksets.read(tmp_path / 'set', recipe(tmp_path), tmp_path)
    assert (task.cpus, task.memory_mb, task.storage_mb, task.agent_timeout_sec) == (3, 700, None, 7)
    config = recipe(tmp_path, memory_mb=128, disk_mb=64, verifier_timeout=9.0)
    (task,), _ = tasksets.read(tmp_path / 'set', config, tmp_path)
    assert (task.cpus, task.memory_mb, task.storage_mb, task.agent_timeout_sec) == (3, 128, 64, 7)
    assert task.verifier_timeout_sec == 9


def test_what_other_backends_lack_is_left_out_once(tmp_path, caplog):
    for name, toml in (('a', ''), ('b', '[environment]\ngpus = 1\n'), ('c', '[')):
        write(tmp_path / 'set' / name, toml)
    config = recipe(tmp_path)
    work = Workdir(tmp_path / 'run', config)
    with caplog.at_level(logging.WARNING):
        assert [task.task_id for task in work.tasks('train')] == ['a']
        work.tasks('train')
    (said,) = (record.getMessage() for record in caplog.records)
    assert f'{tmp_path}/set: 2 of 3 tasks left out: c (' in said
    assert "b (needs [environment] gpus; sandbox.backend='harbor' runs it)" in said
    assert [one.task_id for one in work.read_tasks('train').left_out] == ['c', 'b']
    config.sandbox.backend = 'harbor'
    tasks, left_out = tasksets.read(tmp_path / 'set', config, tmp_path)
    assert ([task.task_id for task in tasks], [one.task_id for one in left_out]) == (
        ['a', 'b'],
        ['c'],
    )


def test_nothing_left_is_an_error(tmp_path):
    write(tmp_path / 'set' / 'a', '[environment]\ngpus = 1\n')
    with pytest.raises(ValueError, match=r'none of 1 tasks can be run; 1: needs \[environment\] g'):
        tasksets.read(tmp_path / 'set', recipe(tmp_path), tmp_path)


@pytest.mark.slow
def test_a_worker_that_lacks_a_task_goes_on(tmp_path, tiny_tokenizer, monkeypatch):
    """The learner has a variable that this machine has not: an INFRA_ERROR with the reason."""
    generate_tasks(tmp_path / 'set', split='train', count=2)
    first, second = sorted(path for path in (tmp_path / 'set').iterdir() if path.is_dir())
    with (first / 'task.toml').open('a') as file:
        file.write('\n[verifier.env]\nKEY = "${ECHO_JAX_LEARNERS_KEY}"\n')
    config = recipe(tmp_path)
    monkeypatch.setattr(Workdir, 'tokenizer', lambda self: tiny_tokenizer)
    work = Workdir(tmp_path / 'run', config)
    policy = ScriptedPolicy(tiny_tokenizer, [DONE])
    policy.version = 0
    worker = RolloutWorker(work, policy, 'here')
    names = (first.name, second.name, 'unknown')
    due = DueGroups('train', 'train', 0, names, group_size=1, temperature=1.0, version=0)

    async def draw():
        for group_id in due.group_ids:
            await worker.draw(due, group_id, lambda rollout: None)
            policy.__init__(tiny_tokenizer, [DONE])
        worker._make_sandbox.close()

    asyncio.run(draw())
    drawn = RolloutStore(work.url('rollouts', 'train')).read_groups(due.group_ids)
    missing, whole, unknown = (group[0] for group in drawn)
    assert (missing.task_id, missing.status) == (first.name, Status.INFRA_ERROR)
    assert 'cannot be run by worker here: ' in missing.reason
    assert 'needs the variable ECHO_JAX_LEARNERS_KEY' in missing.reason
    assert whole.status == Status.OK, whole.reason
    assert unknown.status == Status.INFRA_ERROR
    assert 'it is not among the 1 tasks of train here' in unknown.reason
