"""The clock's metrics of a step, by hand, with workers' reports in a real store."""

import logging
import time

import numpy as np
import pytest

from echo_jax.policy.meter import Meter
from echo_jax.run.pace import Pace
from echo_jax.store.due import DueStore
from echo_jax.store.rollouts import RolloutStore
from tests.support.viewed_run import conversation, make_run, write_group


class Reports:
    """The engines of a source of workers, which itself needs a model."""

    def __init__(self, url):
        self.due = DueStore(url)

    def engines(self):
        return {each['worker']: each for each in self.due.reports()}


@pytest.fixture
def work(tmp_path):
    return make_run(tmp_path / 'run')


def test_a_step_by_hand(work):
    source = Reports(work.url('fleet'))
    pace = Pace(work, source, num_steps=10)
    for name, idle, rate in (('a', 0.25, 300.0), ('b', 0.5, 200.0)):
        values = {'idle_now': idle, 'swapping_now': idle / 10, 'tokens_per_sec': rate}
        source.due.report(name, Meter().read() | values)
    rollouts = [conversation('x\n'), conversation('y\n' * 9)]
    tokens = sum(len(r.tokens) for r in rollouts)
    begun = time.monotonic()
    first = pace.step(4, rollouts, begun, begun + 3.0, begun + 5.0)
    assert (first['time/sampling'], first['time/learning']) == (3.0, 2.0)
    assert first['system/learned_tokens_per_sec'] == tokens / 2.0
    # Of the time from row to row, whatever that is on this machine.
    assert first['system/learner_idle'] == 3.0 / first['time/step']
    assert first['time/left'] == first['time/step'] * 6
    assert first['system/engines'] == 2 and first['system/sampled_tokens_per_sec'] == 500.0
    engines = {name: value for name, value in first.items() if '/engine_' in name}
    assert engines == {
        'system/engine_idle/a': 0.25,
        'system/engine_idle/b': 0.5,
        'system/engine_swapping/a': 0.025,
        'system/engine_swapping/b': 0.05,
    }
    assert 0 < first['system/disk_free_bytes'] < 1e18 and first['system/damaged_groups'] == 0
    write_group(work, 7)
    file = work.path / 'rollouts' / 'train' / 'groups' / f'{7:012d}'
    file.write_bytes(file.read_bytes()[:-1])
    assert RolloutStore(work.url('rollouts', 'train')).read_sound([7]) == {}
    time.sleep(0.05)
    second = pace.step(5, rollouts, begun, begun + 1.0, begun + 2.0)
    assert second['time/step'] >= 0.05 and second['system/damaged_groups'] == 1
    mean = np.mean([first['time/step'], second['time/step']])
    assert second['time/left'] == pytest.approx(mean * 5)


def test_a_report_that_is_damaged_ends_no_run(work, caplog):
    source = Reports(work.url('fleet'))
    source.due.report('a', Meter().read())
    (file,) = (work.path / 'fleet' / 'workers').iterdir()
    file.write_bytes(b'half of a rep')
    with caplog.at_level(logging.WARNING):
        values = Pace(work, source, 10).step(1, [], 0.0, 1.0, 2.0)
    assert (values['time/sampling'], values['system/engines']) == (1.0, 0.0)
    assert 'workers/a is damaged, and counts as if it were not there: checksum' in caplog.text
