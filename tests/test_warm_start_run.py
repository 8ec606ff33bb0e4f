"""Warm starts of runs whose options of `loss` ask for more than a supervised step has."""

import pytest

from tests.support.small_run import metrics

KL = ('--config.num_steps=2', '--config.loss.kl_coef=0.05')
# The step after it then takes a traced coefficient and corrections for every token.
REWARD = (
    *KL,
    '--config.loss.kl_in=reward',
    '--config.loss.kl=k2',
    '--config.loss.mismatch=token',
    '--config.loss.reduction=token_mean',
    '--config.loss.targets=observation',
    '--config.loss.env_schedule.name=linear',
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize('flags', [KL, REWARD], ids=['loss', 'reward'])
def test_a_warm_start_before_the_kl_term(programs, finished, tmp_path, flags):
    """It does what it does without these options, and the frozen model is where it ended."""
    workdir = tmp_path / 'run'
    programs.train(workdir, *flags, without=['num_steps'])
    assert metrics(workdir, 'warm_start.jsonl') == metrics(finished, 'warm_start.jsonl')
    first, second = metrics(workdir)
    assert first['train/reference_kl'] == pytest.approx(0, abs=1e-6)
    assert second['train/reference_kl'] > 0
