"""Runs that go on longer, on another mesh, and with less kept, as processes of their own."""

import json
import pathlib
import shutil
import signal

import numpy as np
import pytest

from echo_jax.store.rollouts import RolloutStore
from tests.support.small_run import HELDOUT, SETTINGS, metrics, summary, wait_for

STEPS, GROUPS = SETTINGS['num_steps'], SETTINGS['batch']['groups']
TWO_DEVICES = {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}


@pytest.fixture(scope='module')
def short(programs, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run of four steps, which has come to its end."""
    workdir = tmp_path_factory.mktemp('short') / 'run'
    programs.train(workdir, '--config.num_steps=4', without=['num_steps'])
    return workdir


@pytest.fixture
def copied(short, tmp_path) -> pathlib.Path:
    return shutil.copytree(short, tmp_path / 'run')


def groups(workdir: pathlib.Path, name: str) -> list:
    store = RolloutStore(workdir / 'rollouts' / name)
    return store.read_groups(store.groups())


def steps_done(workdir: pathlib.Path) -> int:
    file = workdir / 'metrics.jsonl'
    return file.read_bytes().count(b'\n') if file.exists() else 0


def history(workdir: pathlib.Path) -> list[dict]:
    return [
        json.loads(line) for line in (workdir / 'config_history.jsonl').read_text().splitlines()
    ]


@pytest.mark.timeout(600)
def test_a_finished_run_made_longer_is_as_if_it_had_been_that_long(programs, finished, copied):
    assert summary(copied)['steps'] == 4 and not (copied / 'config_history.jsonl').exists()
    done = programs.run('train', *programs.train_flags(copied))
    assert done.returncode == 0, done.stderr
    assert 'from step 4 on: num_steps 4 -> 6\n' in done.stdout
    assert metrics(copied) == metrics(finished)
    assert summary(copied) == summary(finished)
    for name in ('train', 'heldout_before', 'heldout_000004', 'heldout_after'):
        ours, theirs = groups(copied, name), groups(finished, name)
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(np.ravel(ours), np.ravel(theirs)):
            np.testing.assert_array_equal(mine.tokens, other.tokens)
            np.testing.assert_array_equal(mine.rollout_logprobs, other.rollout_logprobs)
            np.testing.assert_array_equal(mine.policy_versions, other.policy_versions)
    ours, theirs = (json.loads((run / 'config.json').read_text()) for run in (copied, finished))
    assert ours == theirs
    [row] = history(copied)
    assert (row['step'], row['changes']) == (4, {'num_steps': [4, STEPS]})


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_after_it_was_made_longer_goes_on(programs, finished, copied):
    process = programs.start('train', *programs.train_flags(copied))
    try:  # the fifth step has its rollouts: what an ending leaves is gone, no step is done
        wait_for(lambda: process.poll() is not None or len(groups(copied, 'train')) > 4 * GROUPS)
        assert process.poll() is None
        assert not (copied / 'summary.json').exists() and not groups(copied, 'heldout_after')
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()
    wait_for(lambda: not programs.alive())
    programs.train(copied)
    assert metrics(copied) == metrics(finished) and summary(copied) == summary(finished)
    assert len(history(copied)) == 1


@pytest.mark.timeout(600)
def test_a_run_goes_on_on_another_mesh(programs, finished, copied):
    mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=1', '--config.batch.micro_rows=2']
    programs.train(copied, *mesh, without=['batch.micro_rows'], **TWO_DEVICES)
    rows, expected = metrics(copied), metrics(finished)
    assert rows[:4] == expected[:4]
    for row, other in zip(rows[4:], expected[4:], strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert summary(copied) == pytest.approx(summary(finished), rel=1e-3, abs=1e-5)
    [row] = history(copied)
    assert row['changes'] == {
        'num_steps': [4, STEPS],
        'mesh.data': [1, 2],
        'mesh.fsdp': [-1, 1],
        'batch.micro_rows': [4, 2],
    }


def test_what_may_not_change_is_refused_by_the_programs(programs, copied):
    before = (copied / 'config.json').read_text()
    line = programs.fails('train', *programs.train_flags(copied, '--config.optimizer.b2=0.9'))
    assert 'is a run of another config (optimizer.b2 is 0.95 there, 0.9 here)' in line
    line = programs.fails('train', *programs.train_flags(copied, '--config.num_steps=3'))
    assert '(num_steps is 4 there, 3 here); a run may be made longer and not shorter' in line
    assert (copied / 'config.json').read_text() == before
    assert not (copied / 'config_history.jsonl').exists()


@pytest.mark.timeout(600)
def test_old_rollouts_are_removed_but_none_that_a_resumed_run_needs(programs, finished, tmp_path):
    workdir, keep = tmp_path / 'run', ['--config.logging.rollouts=0', '--config.checkpoint.keep=1']
    saves, store = workdir / 'checkpoints' / 'train', RolloutStore(workdir / 'rollouts' / 'train')
    process = programs.start('train', *programs.train_flags(workdir, *keep))
    try:  # after the save of step 4, which removed what only one of step 2 does not need
        wait_for(lambda: process.poll() is not None or steps_done(workdir) > 4)
        wait_for(lambda: process.poll() is not None or (saves / '4').exists())
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finally:
        process.kill()
    oldest = min(int(path.name) for path in saves.glob('[0-9]'))
    assert 2 * GROUPS <= store.groups()[0] <= oldest * GROUPS
    programs.train(workdir, *keep)
    assert metrics(workdir) == metrics(finished) and summary(workdir) == summary(finished)
    assert store.groups() == list(range(4 * GROUPS, STEPS * GROUPS))
    assert (
        not groups(workdir, 'heldout_000002') and len(groups(workdir, 'heldout_after')) == HELDOUT
    )
