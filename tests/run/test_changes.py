"""What of its config may change when a run goes on, and what is written down about it."""

import json

import pytest

from configs import base, tiny
from echo_jax.run.changes import CHANGEABLE, check_longer, find_changes
from echo_jax.run.inert import flat
from echo_jax.run.workdir import Workdir

# What changes the rollouts that a step sees, the loss, the schedule, or what is compared at the
# end. This list is by hand, so that a row of the table cannot let one of them in.
FOR_GOOD = (
    *('seed', 'group_size', 'max_staleness', 'batch.groups', 'batch.oversample', 'batch.updates'),
    *('batch.deadline_sec', 'batch.epochs', 'batch.mini', 'loss.env_coef', 'loss.clip_low'),
    *('loss.env_schedule.name', 'loss.mismatch', 'protocol.max_turns', 'batch.stragglers'),
    *('model.path', 'model.dtype', 'model.hidden_size', 'model.rope_theta', 'policy.backend'),
    *('policy.temperature', 'policy.swap', 'optimizer.learning_rate', 'optimizer.warmup_steps'),
    *('optimizer.decay_steps', 'optimizer.name', 'sandbox.backend', 'sandbox.processes'),
    *('sandbox.agent_timeout', 'sandbox.shell', 'verifier.kill_agent_processes', 'tasks.train'),
    *('tasks.heldout', 'tasks.train_count', 'warm_start.steps', 'warm_start.optimizer.name'),
    *('eval.temperature', 'eval.samples', 'eval.every', 'eval.tasks'),
    'protocol.thinking',
)
MAY_CHANGE = (
    *('num_steps', 'num_epochs', 'mesh.data', 'mesh.tensor', 'sharding.mlp', 'batch.micro_rows'),
    *('batch.seq_len', 'batch.pack', 'model.attention', 'model.remat', 'policy.slots'),
    *('policy.tensor_parallel', 'policy.lease_sec', 'sandbox.at_once', 'eval.balance'),
    *('logging.scores', 'logging.rollouts', 'checkpoint.every', 'checkpoint.keep_best'),
)


def as_json(backend='vllm', **values) -> dict:
    config = base.get_config()
    config.policy.backend = backend
    document = json.loads(config.to_json())
    for key, value in values.items():
        *sections, last = key.split('.')
        section = document
        for name in sections:
            section = section[name]
        section[last] = value
    return document


def longer(there: dict, here: dict) -> None:
    check_longer(find_changes(there, here, 'RUN'), here, 'RUN')


@pytest.mark.parametrize('key', FOR_GOOD)
def test_what_changes_what_is_learned_stays(key):
    with pytest.raises(ValueError) as error:
        find_changes(as_json(), as_json(**{key: 'other', 'mesh.data': 7}), 'RUN')
    line = str(error.value)
    assert line.startswith(f'RUN is a run of another config ({key} is ') and '\n' not in line
    assert "'other' here); resume it with its own, or give another --workdir; when" in line
    assert 'only num_steps, num_epochs, mesh, sharding, batch.micro_rows, ' in line


@pytest.mark.parametrize('key', MAY_CHANGE)
def test_what_changes_nothing_that_is_learned_may_change(key):
    there, here = as_json(), as_json(**{key: 'other'})
    assert find_changes(there, here, 'RUN') == {key: [flat(base.get_config())[key], 'other']}


def test_the_table_names_keys():
    keys = flat(base.get_config())
    for name in (name for row in CHANGEABLE for name in row.keys):
        assert any(f'{key}.'.startswith(f'{name}.') for key in keys), name
    assert {*FOR_GOOD, *MAY_CHANGE} <= keys.keys()


def test_the_slots_of_the_embedded_policy_decide_its_waves():
    with pytest.raises(ValueError, match=r'policy\.slots is 256 there, 8 here'):
        find_changes(as_json('jax'), as_json('jax', **{'policy.slots': 8}), 'RUN')


def test_a_key_that_the_run_was_made_without_is_named():
    there = as_json()
    del there['logging']['rollouts']
    assert find_changes(there, as_json(), 'RUN') == {'logging.rollouts': ['absent', None]}


def test_a_run_is_made_longer_and_not_shorter():
    six, eight = as_json(num_steps=6), as_json(num_steps=8)
    longer(six, eight)
    longer(as_json(num_epochs=1), as_json(num_epochs=2))
    with pytest.raises(ValueError, match=r'\(num_steps is 8 there, 6 here\); a run may be made lo'):
        longer(eight, six)
    with pytest.raises(ValueError, match=r'\(num_epochs is None there, 2 here\); a run may be'):
        longer(six, as_json(num_steps=6, num_epochs=2))
    with pytest.raises(ValueError, match=r"name='linear' the steps that there are would have had "):
        longer(
            as_json(num_steps=6, **{'loss.env_schedule.name': 'linear'}),
            as_json(num_steps=8, **{'loss.env_schedule.name': 'linear'}),
        )
    by_steps = {'loss.env_schedule.name': 'steps'}
    longer(as_json(num_steps=6, **by_steps), as_json(num_steps=8, **by_steps))


def with_steps(steps: int, **values):
    config = tiny.get_config()
    config.num_steps = steps
    config.update_from_flattened_dict(values)
    return config


def test_what_changed_is_recorded_once_the_learner_goes_on(tmp_path):
    run, file = tmp_path / 'run', tmp_path / 'run' / 'config_history.jsonl'
    assert Workdir(run, with_steps(4), is_learner=True).go_on(0) == {}
    assert not file.exists()
    learner = Workdir(run, with_steps(6, **{'checkpoint.keep': 1}), is_learner=True)
    assert Workdir.open(run).config.num_steps == 4  # until it goes on
    changes = {'num_steps': [4, 6], 'checkpoint.keep': [2, 1]}
    assert learner.go_on(4) == changes
    assert learner.go_on(4) == {}
    assert Workdir.open(run).config.to_dict() == learner.config.to_dict()
    [row] = map(json.loads, file.read_text().splitlines())
    assert (row['step'], row['changes']) == (4, changes)

    # Killed between the two files, it says so once, and goes on.
    after = (run / 'config.json').read_text()
    Workdir(run, with_steps(8, **{'checkpoint.keep': 1}), is_learner=True).go_on(5)
    (run / 'config.json').write_text(after)
    Workdir(run, with_steps(8, **{'checkpoint.keep': 1}), is_learner=True).go_on(5)
    assert [row['step'] for row in map(json.loads, file.read_text().splitlines())] == [4, 5]
    assert Workdir.open(run).config.num_steps == 8


def test_others_keep_to_the_config_that_they_were_started_with(tmp_path):
    run = tmp_path / 'run'
    Workdir(run, with_steps(6), is_learner=True)
    document = (run / 'config.json').read_text()
    worker = Workdir(run, with_steps(4, **{'sandbox.at_once': 3}))
    assert worker.config.sandbox.at_once == 3
    assert (run / 'config.json').read_text() == document
    with pytest.raises(ValueError, match=r'num_steps is 6 there, 4 here'):
        Workdir(run, with_steps(4), is_learner=True)
