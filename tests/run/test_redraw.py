"""Groups of equal rewards, drawn again: which tasks, which numbers, and what stays."""

import pytest

from echo_jax.run.redraw import other_tasks, redraw_equal
from echo_jax.run.sources import groups_of_step
from echo_jax.store.due import DueGroups
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Task
from tests.support.random_rollouts import make_rollout, small_config


def tasks(count, **fields):
    return [Task(f'task-{i}', path=None, instruction='', **fields) for i in range(count)]


def group_of(group_id: int, task_id: str, equal: bool) -> list[Rollout]:
    group = [make_rollout('PAO', float(i and not equal), group_id, i) for i in range(2)]
    for rollout in group:
        rollout.task_id = task_id
    return group


class StoredSource:
    """Draws what its store lacks; the rewards of a task in `unequal` differ."""

    def __init__(self, store: RolloutStore, unequal: set[str]):
        self.store, self.unequal = store, unequal
        self.posted: list[DueGroups] = []
        self.drawn: list[int] = []

    def publish(self, params, version):
        raise AssertionError('no weights are published here')

    def post(self, due):
        self.posted.append(due)

    def wait(self, due):
        assert due == self.posted[-1]
        for group_id, task_id in due.assignments:
            if group_id in self.store.missing([group_id]):
                self.store.write_group(group_of(group_id, task_id, task_id not in self.unequal))
                self.drawn.append(group_id)
        return self.store.read_groups(due.group_ids)

    def close(self):
        pass


def recipe(limit=4, **loss):
    return small_config(
        groups=3, group_size=2, **{'equal_groups': 'redraw'} | loss, redraw_limit=limit
    )


def first_draw(done, config, equal=(True, False, True)):
    """The rollouts of the step after `done`, of tasks 0 to 2."""
    start = done * groups_of_step(config)
    return [r for i in range(3) for r in group_of(start + i, f'task-{i}', equal[i])]


def ids(rollouts):
    return sorted({r.group_id for r in rollouts})


def test_by_hand(tmp_path):
    """Step 3 has the numbers 14 to 20: 3 of its own, and 4 that may be drawn anew."""
    config, done = recipe(), 2
    assert groups_of_step(config) == 7
    anew = other_tasks(tasks(20), {f'task-{i}' for i in range(3)}, config, done)
    assert len(anew) == 4
    # Groups 14 and 16 are equal. Two tasks are drawn: the first is equal again, the second takes
    # the place of 14. One more is drawn for 16, and takes its place.
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal={anew[1], anew[2]})
    rollouts, metrics = redraw_equal(
        first_draw(done, config), source, {'train': tasks(20)}, config, done
    )
    assert [due.group_ids for due in source.posted] == [range(17, 19), range(19, 20)]
    assert [due.task_ids for due in source.posted] == [tuple(anew[:2]), (anew[2],)]
    assert {(due.version, due.store, due.temperature) for due in source.posted} == {
        (2, 'train', config.policy.temperature)
    }
    assert ids(rollouts) == [15, 18, 19] and len(rollouts) == 6
    assert metrics == {'rollout/redrawn_groups': 3.0, 'rollout/equal_groups': 0.0}


def test_the_bound_holds_and_what_is_equal_then_stays(tmp_path):
    config = recipe(limit=3)
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal=set())
    rollouts, metrics = redraw_equal(first_draw(0, config), source, {'train': tasks(20)}, config, 0)
    assert [len(due.task_ids) for due in source.posted] == [2, 1]
    assert ids(rollouts) == [0, 1, 2]
    assert metrics == {'rollout/redrawn_groups': 3.0, 'rollout/equal_groups': 2.0}


def test_a_run_that_was_killed_draws_only_what_is_missing(tmp_path):
    config, store = recipe(), RolloutStore(tmp_path / 'store')
    splits = {'train': tasks(20)}
    taken = {'task-0', 'task-1', 'task-2'}
    unequal = set(other_tasks(splits['train'], taken, config, 1)[2:])
    first = StoredSource(store, unequal)
    whole, metrics = redraw_equal(first_draw(1, config), first, splits, config, 1)
    assert first.drawn == [10, 11, 12, 13]
    resumed = StoredSource(store, unequal)
    again, same = redraw_equal(first_draw(1, config), resumed, splits, config, 1)
    assert resumed.drawn == [] and resumed.posted == first.posted
    assert (ids(again), same) == (ids(whole), metrics) and ids(whole) == [8, 12, 13]


def test_the_tasks_are_others_and_in_the_steps_own_order():
    config = recipe(limit=100)
    trained, unrewarded = tasks(10), tasks(12, environment_only=True)[10:]
    first = other_tasks([*trained, *unrewarded], {'task-3'}, config, 0)
    assert sorted(first) == sorted(t.task_id for t in trained if t.task_id != 'task-3')
    assert first == other_tasks([*trained, *unrewarded], {'task-3'}, config, 0)
    assert first != other_tasks(trained, {'task-3'}, config, 1)


@pytest.mark.parametrize('choice', ['keep', 'drop'])
def test_otherwise_nothing_is_drawn(tmp_path, choice):
    config = recipe(equal_groups=choice)
    assert groups_of_step(config) == 3
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal=set())
    rollouts = first_draw(0, config)
    assert redraw_equal(rollouts, source, {'train': tasks(20)}, config, 0) == (rollouts, {})
    assert source.posted == []


def test_no_other_task_and_no_group_are_ordinary_cases(tmp_path):
    config = recipe()
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal=set())
    rollouts, metrics = redraw_equal(first_draw(0, config), source, {'train': tasks(3)}, config, 0)
    assert ids(rollouts) == [0, 1, 2] and metrics['rollout/redrawn_groups'] == 0
    assert redraw_equal([], source, {'train': tasks(3)}, config, 0)[0] == []
    assert source.posted == []
