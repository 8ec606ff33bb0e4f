"""Evaluations between start and end that workers draw beside the groups of training."""

import numpy as np
import pytest

from configs import base, tiny
from echo_jax.run.heldout import Heldout
from echo_jax.types import Task
from tests.support.groups import small_group


class Slow:
    """A source whose groups are there when a test says so."""

    there = frozenset()

    def post(self, due):
        pass

    def is_there(self, due):
        return due.version in self.there

    def wait(self, due):
        return [small_group(i, task_id, due.version) for i, task_id in due.assignments]


def test_the_save_of_a_version_stays_until_its_evaluation_is_there():
    c = base.get_config()
    c.policy.backend, c.max_staleness = 'vllm', 4
    c.eval.every, c.eval.tasks, c.eval.samples, c.checkpoint.keep_best = 20, 2, 1, True
    source = Slow()
    heldout = Heldout(source, [Task('a', None, ''), Task('b', None, '')], c, 100, None)
    assert 20 not in heldout.kept_versions
    heldout.post(20)
    for done in (20, 25, 30):
        assert heldout.collect(done) == {} and 20 in heldout.kept_versions
    source.there = frozenset({20})
    assert 'eval/solve_rate' in heldout.collect(31)
    assert heldout.kept_versions == [20]  # the best by now
    c.checkpoint.keep_best = False
    assert heldout.kept_versions == []


@pytest.mark.parametrize(('versions', 'kept'), [((0, 50, 0), 2), ((50, 50, 50), 3), ((0, 0, 0), 3)])
def test_what_later_weights_drew_is_not_from_before_training(versions, kept, capsys):
    """A resumed run has damaged ones drawn anew."""

    class Resumed(Slow):
        def wait(self, due):
            return [small_group(i, id, versions[i], size=1) for i, id in due.assignments]

    def score(params, batch):
        return np.zeros(batch.tokens.shape, np.float32)

    heldout = Heldout(Resumed(), [Task(id, None, '') for id in 'abc'], tiny.get_config(), 9, score)
    found = heldout.draw('before', None, version=0)
    assert len(heldout.rollouts) == kept and found['solve_rate_before'] == 0.0
    said = ' '.join(capsys.readouterr().out.split())
    lost = sum(version > 0 for version in versions)
    assert (f'{lost} of 3 rollouts of heldout_before were lost' in said) == (lost > 0)
    assert ('is of these, since there are no others' in said) == (lost == 3)
