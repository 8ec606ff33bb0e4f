"""Runs whose steps have several updates, as processes: whole, and killed within a batch."""

import signal

import pytest

from tests.support.every_option import RUNS, flags_of
from tests.support.small_run import SETTINGS, metrics, summary, wait_for

GROUPS = SETTINGS['batch']['groups']
LIMIT = RUNS['updates'].values['loss.redraw_limit']
FLAGS, WITHOUT = flags_of('updates')


def written(workdir):
    folder = workdir / 'rollouts' / 'train' / 'groups'
    return len(list(folder.glob('[0-9]' * 12))) if folder.exists() else 0


def rows(workdir):
    file = workdir / 'metrics.jsonl'
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture(scope='module')
def alone(run_of):
    return run_of('updates')


@pytest.mark.timeout(900)
def test_a_run_with_several_updates(alone):
    found = metrics(alone)
    assert [row['step'] for row in found] == [1, 2, 3, 4]
    for row in found:
        assert row['train/grad_norm_last'] > 0
        assert row['train/grad_norm'] != row['train/grad_norm_last']
        assert row['rollout/redrawn_groups'] == LIMIT and row['rollout/equal_groups'] == GROUPS
        assert row['rollout/staleness'] == 0  # one version a step
    # Each of 4 rollouts is in 2 epochs.
    targets = [row['train/target_tokens'] for row in found]
    assert all(number % 2 == 0 for number in targets) and max(targets) > 0
    assert written(alone) == 4 * (GROUPS + LIMIT)
    assert summary(alone)['steps'] == 4


@pytest.mark.timeout(900)
def test_killed_between_two_updates_of_a_batch(programs, alone, tmp_path):
    """All groups of the third step are there and its row is not: the batch is being learned."""
    workdir = tmp_path / 'run'
    process = programs.start('train', *programs.train_flags(workdir, *FLAGS, without=WITHOUT))
    try:
        wait_for(
            lambda: written(workdir) == 3 * (GROUPS + LIMIT) or process.poll() is not None,
            poll=0.001,
            seconds=600,
        )
        assert process.poll() is None and rows(workdir) == 2
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert rows(workdir) == 2
    wait_for(lambda: not programs.alive())
    programs.train(workdir, *FLAGS, without=WITHOUT)
    assert metrics(workdir) == metrics(alone)
    assert summary(workdir) == summary(alone)


@pytest.mark.timeout(600)
def test_what_cannot_act_is_named_once_and_refused_as_a_flag(programs, alone, tmp_path):
    flags = programs.train_flags(alone, *FLAGS, without=WITHOUT)
    again = programs.run('train', *flags)
    [line] = [each for each in again.stdout.splitlines() if 'cannot act' in each]
    assert 'warm_start.optimizer' in line and 'clip_low' not in line
    plain = ['--config=configs/tiny.py', f'--workdir={tmp_path / "run"}']
    for flag in ('loss.clip_high=0.28', 'loss.old_logprobs=recomputed', 'batch.mini=rollouts'):
        assert f'--config.{flag} has no effect' in programs.fails(
            'train', *plain, f'--config.{flag}'
        )
