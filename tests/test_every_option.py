"""Every option in a small real run: that none is left out, and that the runs end well."""

import math
import re

import pytest

from configs import base
from echo_jax.run.checks import check_config
from echo_jax.run.inert import flat
from tests.support.every_option import ELSEWHERE, KNOWN, RUNS, TEXTS, config_of, uncovered
from tests.support.metrics_page import table
from tests.support.small_run import ROOT, metrics


def test_no_option_is_left_out():
    """Each value of each documented key is in a run, or stands in ELSEWHERE with the reason."""
    assert set(uncovered(list(RUNS))) == ELSEWHERE.keys()
    # An option that is a name says which ones there are.
    names = {key for key, value in flat(base.get_config()).items() if isinstance(value, str)}
    assert names == {*KNOWN, *TEXTS}


def test_what_is_run_elsewhere_is():
    """The tests that ELSEWHERE names are there and speak of the key, or of its value."""
    for option, reason in ELSEWHERE.items():
        for pattern in re.findall(r'tests/[\w/*]+\.py', reason):
            texts = [path.read_text() for path in ROOT.glob(pattern)]
            words = option.split(' = ')
            assert any(words[-1].strip("'").split('.')[-1] in text for text in texts), option


@pytest.mark.parametrize('name', [name for name in RUNS if name != 'plain'])
def test_every_run_is_needed(name):
    config = config_of(name)
    if RUNS[name].devices == 1:  # as many as this process has
        check_config(config, RUNS[name].values)
    assert set(uncovered([other for other in RUNS if other != name])) > ELSEWHERE.keys()


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', RUNS)
def test_a_run(run_of, name):
    config, rows = config_of(name), metrics(run_of(name))
    steps = config.num_steps
    if config.num_epochs is not None:
        steps = config.num_epochs * config.tasks.train_count // config.batch.groups
    assert [row['step'] for row in rows] == list(range(1, steps + 1))
    pages, plain = table('metrics.jsonl').keys(), set().union(*metrics(run_of('plain')))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        names = {re.sub(r'^(rollout/age)/[1-9]\d*$', r'\1/N', key) for key in row}
        assert {name for name in names if name.startswith(('train/', 'rollout/'))} <= pages
        assert row.keys() >= set(RUNS[name].logs)
        # Else the options of the policy term would have nothing to act on.
        assert (row['train/action_tokens'] > 0) == (not config.loss.mask_truncated)
    assert any('train/grad_norm_env' in row for row in rows) == config.eval.balance
    assert plain.isdisjoint(RUNS[name].logs)


@pytest.mark.timeout(900)
def test_the_terminal_answers_in_the_run_of_the_environment_term(run_of):
    rows = metrics(run_of('env_term'))
    for role in ('feedback', 'wrapper', 'output', 'scaffold'):
        assert sum(row[f'train/{role}_tokens'] for row in rows) > 0


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', ['kl_in_loss', 'kl_in_reward', 'dual_clip'])
def test_a_warm_start_does_not_depend_on_the_options(run_of, name):
    expected = metrics(run_of('plain'), 'warm_start.jsonl')
    assert metrics(run_of(name), 'warm_start.jsonl') == expected


@pytest.mark.timeout(900)
def test_the_frozen_model_is_where_the_warm_start_ended(run_of):
    first, second = metrics(run_of('kl_in_loss'))
    assert first['train/reference_kl'] == pytest.approx(0, abs=1e-6)
    assert second['train/reference_kl'] > 0
