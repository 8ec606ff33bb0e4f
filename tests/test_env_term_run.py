"""The environment term's options in whole runs of the learner's program."""

import json
import shutil

import pytest

from echo_jax.tasks.generate import generate_tasks
from tests.support.every_option import flags_of
from tests.support.small_run import NO_WARM_START, SETTINGS, metrics, summary

STEPS = SETTINGS['num_steps']


@pytest.mark.timeout(900)
def test_every_option_at_once_and_resumed(programs, run_of, tmp_path):
    alone, workdir = run_of('env_term'), tmp_path / 'run'
    rows, whole = metrics(alone), summary(alone)
    for row in rows:
        assert 0.001 <= row['train/env_coef'] <= 0.2
        assert 'train/grad_norm_env' in row  # in one step to adapt, in the next to be shown
        assert row['train/env_dropped/capped'] >= 0 and row['train/env_filtered/clean'] >= 0
        assert row['train/env_dropped/surprising'] <= 0.3 * row['train/target_tokens'] / 0.7
    assert any(row['train/env_dropped/surprising'] > 0 for row in rows)
    assert len({row['train/env_coef'] for row in rows}) > 1
    # Resumed at step 4, it goes on with the coefficient that it had.
    shutil.copytree(alone, workdir)
    shutil.rmtree(workdir / 'checkpoints' / 'train' / str(STEPS))
    (workdir / 'summary.json').unlink()
    flags, without = flags_of('env_term')
    programs.train(workdir, *flags, without=without)
    assert metrics(workdir) == rows and summary(workdir) == whole


@pytest.mark.timeout(900)
def test_environment_only_tasks_under_a_schedule(programs, tmp_path):
    """No task is verified, there is no reward, and the coefficient falls to 0."""
    folder = generate_tasks(tmp_path / 'tasks', split='train', count=20)
    for script in folder.glob('*/tests/test.sh'):
        script.write_text('sleep 600\n')  # would be a VERIFIER_ERROR, and late
    flags = (
        f'--config.tasks.train={folder}:environment_only',
        '--config.loss.env_schedule.name=steps',
        '--config.loss.env_schedule.steps=(2,4)',
        '--config.loss.env_schedule.coefs=(0.02,0.0)',
        *NO_WARM_START,
    )
    without = ('tasks.train_count', 'warm_start')
    programs.train(tmp_path / 'run', *flags, without=without)
    rows = metrics(tmp_path / 'run')
    coefs = [row['train/env_coef'] for row in rows]
    assert coefs == [0.05, 0.05, 0.02, 0.02, 0.0, 0.0]
    for row in rows:
        assert row['rollout/environment_only'] == 1 and 'rollout/reward' not in row
        assert row['rollout/status/verifier_error'] == row['train/policy_loss'] == 0
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text())['steps'] == STEPS
