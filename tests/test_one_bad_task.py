"""One bad task among five ends neither a training run nor an evaluation: it is nobody's reward."""

import json
import shutil
import socket

import pytest

from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Status
from tests.support.bad_tasks import break_encoding, break_link, break_user, make_set
from tests.support.small_run import HELDOUT, NO_WARM_START, metrics, summary

BREAKS = pytest.mark.parametrize('damage', [break_user, break_link, break_encoding])


@BREAKS
def test_training_goes_on(programs, tmp_path, damage):
    bad, word = make_set(tmp_path / 'set', damage)
    flags = [f'--config.tasks.train={tmp_path / "set"}', *NO_WARM_START]
    without = ['warm_start', 'tasks.train_count']
    flags = programs.train_flags(tmp_path / 'run', *flags, without=without)
    done = programs.run('train', *flags)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if f'task {bad}, ' in line]
    whose = f'] run=run host={socket.gethostname()} process=0: task {bad}, group '
    assert said and all(whose in line for line in said)
    rows = metrics(tmp_path / 'run')
    assert len(rows) == summary(tmp_path / 'run')['steps'] == 6
    store = RolloutStore(tmp_path / 'run' / 'rollouts' / 'train')
    rollouts = [rollout for group in store.read_groups(store.groups()) for rollout in group]
    lost = [rollout for rollout in rollouts if rollout.task_id == bad]
    assert lost and len({rollout.task_id for rollout in rollouts}) == 5
    for rollout in lost:
        assert rollout.status == Status.INFRA_ERROR and word in rollout.reason
    assert all(r.status != Status.INFRA_ERROR for r in rollouts if r.task_id != bad)
    assert sum(row['rollout/status/infra_error'] for row in rows) == len(lost)
    errors = [value for row in rows for name, value in row.items() if '/error/' in name]
    assert sum(errors) == len(lost)


@BREAKS
@pytest.mark.parametrize('agent', ['oracle', 'nop', 'policy'])
def test_evaluation_goes_on(programs, finished, tmp_path, damage, agent):
    bad, word = make_set(tmp_path / 'set', damage)
    output = tmp_path / 'eval.json'
    flags = [f'--tasks={tmp_path / "set"}', f'--output={output}', f'--agent={agent}']
    if agent == 'policy':
        run = tmp_path / 'run'
        shutil.copytree(finished, run)
        flags += programs.train_flags(run)
    else:
        flags.append('--config=configs/tiny.py')
    done = programs.run('evaluate', *flags, COLUMNS='300')
    assert done.returncode == 1, done.stderr
    assert '1 of 5 results are an infra_error; see their reasons' in done.stderr
    results = json.loads(output.read_text())['results']
    [lost] = [result for result in results if result['status'] == 'infra_error']
    assert lost['task_id'] == bad and word in lost['reason'] and len(results) == 5 < HELDOUT
