"""Every option in a small real run: that none is left out, and that the runs end well."""

import math

import pytest

from configs import base
from echo_jax.run.checks import check_config
from echo_jax.run.inert import flat
from tests.support.every_option import KNOWN, RUNS, SECTIONS, config_of, uncovered
from tests.support.metrics_page import table
from tests.support.small_run import metrics


def test_no_option_is_left_out():
    assert uncovered(list(RUNS)) == []
    # An option that is a name says which ones there are.
    names = {key for key, value in flat(base.get_config()).items() if isinstance(value, str)}
    assert {key for key in names if key.partition('.')[0] in SECTIONS} == KNOWN.keys()


@pytest.mark.parametrize('name', [name for name in RUNS if name != 'plain'])
def test_every_run_is_needed(name):
    config = config_of(name)
    check_config(config, RUNS[name].values)
    assert uncovered([other for other in RUNS if other != name]) != []


@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', RUNS)
def test_a_run(run_of, name):
    config, rows = config_of(name), metrics(run_of(name))
    assert [row['step'] for row in rows] == list(range(1, config.num_steps + 1))
    pages, plain = table('metrics.jsonl').keys(), set().union(*metrics(run_of('plain')))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert {key for key in row if key.startswith(('train/', 'rollout/'))} <= pages
        assert row.keys() >= set(RUNS[name].logs)
        # Else the options of the policy term would have nothing to act on.
        assert (row['train/action_tokens'] > 0) == (not config.loss.mask_truncated)
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
