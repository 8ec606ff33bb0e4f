"""Groups that were drawn for a learner before this one, on real stores."""

import threading

import pytest

from echo_jax.run.arrivals import Arrivals
from echo_jax.run.entry import Stop
from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueGroups
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout
from tests.support.ahead_run import recipe
from tests.support.groups import small_group
from tests.support.small_run import wait_for

OLDEST, NEWEST = 5, 6


def drawn(group_id: int, *versions: int) -> list[Rollout]:
    """A group of which each rollout was sampled by one version."""
    groups = [small_group(group_id, 'task', version, len(versions)) for version in versions]
    return [group[i] for i, group in enumerate(groups)]


@pytest.mark.parametrize('store', ['train', 'heldout_after'])
def test_what_other_weights_sampled_for_a_killed_learner_is_drawn_anew(tmp_path, capsys, store):
    work = Workdir(tmp_path / 'run', recipe(staleness=0))
    rollouts = RolloutStore(work.url('rollouts', store))
    arrivals = Arrivals(work, Stop(), lambda: None, lambda: None)
    due = DueGroups(store, 'train', 0, ('task',) * 4, 2, 1.0, OLDEST)
    arrivals.post(due)
    for group in (drawn(0, 5, 5), drawn(1, 4, 5), drawn(2, 5, 7), drawn(3, 5, 6)):
        rollouts.write_group(group)

    def draw_anew():
        wait_for(lambda: rollouts.missing(range(4)) == [1, 2])
        rollouts.write_group(drawn(1, 3, 3))  # the same again, by a worker that is late
        rollouts.write_group(drawn(2, 5, 5))
        wait_for(lambda: rollouts.missing(range(4)) == [1])
        rollouts.write_group(drawn(1, 6, 6))

    worker = threading.Thread(target=draw_anew)
    worker.start()
    groups = arrivals.wait(due, newest=NEWEST)
    worker.join()
    versions = [[int(r.policy_versions[1]) for r in group] for group in groups]
    assert versions == [[5, 5], [6, 6], [5, 5], [5, 6]]
    assert arrivals.due.listed() == []
    said = capsys.readouterr().out
    assert f'groups 1, 2 of {store} were sampled for a learner before this one' in said
