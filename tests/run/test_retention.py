"""Which rollouts a run removes, on real stores."""

import json

import ml_collections
import pytest

from configs import base
from echo_jax.run.retention import remove_old_rollouts
from echo_jax.run.workdir import Workdir
from echo_jax.store.rollouts import RolloutStore
from tests.support.random_rollouts import make_rollout


def make_run(folder, kept, backend='jax', **values) -> Workdir:
    config = base.get_config()
    config.policy.backend, config.batch.groups = backend, 2
    config.eval.every, config.logging.rollouts = 3, kept
    config.update_from_flattened_dict(values)
    work = Workdir(folder, ml_collections.FrozenConfigDict(config))
    for name in ('heldout_before', 'heldout_000003', 'heldout_000006', 'warm_start_explore'):
        write(work, name, 2)
    return work


def write(work: Workdir, store: str, count: int) -> None:
    for group_id in range(count):
        rollout = make_rollout('PA', group=group_id)
        RolloutStore(work.url('rollouts', store)).write_group([rollout])


def left(work: Workdir, store='train') -> list[int]:
    return RolloutStore(work.url('rollouts', store)).groups()


@pytest.mark.parametrize(
    ('kept', 'oldest_save', 'first_step'),
    [
        (None, 8, 1),  # all
        (3, None, 1),  # nothing is saved yet
        (3, 8, 6),  # of steps 6, 7 and 8
        (0, 6, 7),  # a run that is resumed at 6 trains on those of step 7 again
        (3, 2, 3),
        (20, 8, 1),
    ],
)
def test_the_newest_stay_and_what_a_resumed_run_needs(tmp_path, kept, oldest_save, first_step):
    work = make_run(tmp_path / 'run', kept)
    write(work, 'train', 20)  # and those of the two steps ahead
    remove_old_rollouts(work, 8, oldest_save)
    assert left(work) == list(range(2 * (first_step - 1), 20))


def test_groups_that_are_drawn_anew_go_with_their_step(tmp_path):
    redraw = {'loss.equal_groups': 'redraw', 'loss.redraw_limit': 3}
    work = make_run(tmp_path / 'run', 1, **redraw)
    write(work, 'train', 20)  # five numbers a step
    remove_old_rollouts(work, 4, 3)
    assert left(work) == [15, 16, 17, 18, 19]


def test_if_groups_may_be_late_the_ledger_says_which_are_old(tmp_path):
    work = make_run(tmp_path / 'run', 1, 'vllm', max_staleness=2)
    write(work, 'train', 12)
    rows = [
        {'step': 1, 'groups': [1, 3], 'dropped': []},
        {'step': 2, 'groups': [2, 5], 'dropped': [0]},
        {'step': 3, 'groups': [4, 7], 'dropped': [6]},
    ]
    (work.path / 'groups.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    remove_old_rollouts(work, 3, 3)
    assert left(work) == [4, 6, 7, 8, 9, 10, 11]  # 6 was dropped by step 3; those from 8 on wait


def test_an_evaluation_stays_until_no_save_waits_for_it(tmp_path):
    work = make_run(tmp_path / 'run', 0)
    remove_old_rollouts(work, 8, 5)
    assert left(work, 'heldout_000003') == [0, 1]  # of a save at 5, which may not have it yet
    remove_old_rollouts(work, 8, 6)
    assert left(work, 'heldout_000003') == []
    for name in ('heldout_000006', 'heldout_before', 'warm_start_explore'):
        assert left(work, name) == [0, 1]
