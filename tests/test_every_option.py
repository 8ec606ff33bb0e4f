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
    rows, page = metrics(run_of(name)), table('metrics.jsonl')
    assert [row['step'] for row in rows] == list(range(1, config_of(name).num_steps + 1))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert {key for key in row if key.startswith(('train/', 'rollout/'))} <= page.keys()
        assert row.keys() >= set(RUNS[name].logs)
    moved = [row['train/grad_norm'] for row in rows]
    assert max(moved) > 0
    plain = set().union(*metrics(run_of('plain')))
    assert plain.isdisjoint(RUNS[name].logs)
