"""Groups of equal rewards, drawn again: which tasks, which numbers, and what stays."""

import pytest

from echo_jax.learner.batching import rollout_metrics
from echo_jax.run.ahead import Rounds
from echo_jax.run.numbering import Steps, groups_of_step
from echo_jax.run.redraw import other_tasks, redraw_equal
from echo_jax.store.due import DueGroups
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Task
from tests.support.random_rollouts import make_rollout, small_config


def tasks(count, **fields):
    return [Task(f'task-{i}', path=None, instruction='', **fields) for i in range(count)]


def group_of(group_id: int, task_id: str, equal: bool, version: int = 3) -> list[Rollout]:
    group = [
        make_rollout('PAO', float(i and not equal), group_id, i, version=version) for i in range(2)
    ]
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
        assert due in self.posted
        for group_id, task_id in due.assignments:
            if group_id in self.store.missing([group_id]):
                equal = task_id not in self.unequal
                self.store.write_group(group_of(group_id, task_id, equal, due.version))
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
    assert [Steps(config)[group] for group in (0, 6, 7, 14)] == [1, 1, 2, 3]
    anew = other_tasks(tasks(20), {f'task-{i}' for i in range(3)}, config, done)
    assert len(anew) == 4
    # Groups 14 and 16 are equal. Two tasks are drawn: the first is equal again, the second takes
    # the place of 14. One more is drawn for 16, and takes its place.
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal={anew[1], anew[2]})
    rollouts, metrics = redraw_equal(
        first_draw(done, config), source, {'train': tasks(20)}, config, done
    )
    assert [due.group_ids for due in source.posted] == [[17, 18], [19]]
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


STEPS = 6


def steps_of(source, config, state=None, first=0, last=STEPS):
    """(rollouts, metrics of the redraw, where a run that is resumed after it draws on) of each
    step, as the learner's program goes through them; `state` is the position to go on from.
    """
    everything = tasks(30)
    ahead, found = Rounds(everything, source, config, STEPS), []
    if state is not None:
        ahead.set_state(state)
    for done in range(first, last):
        drawn, _ = ahead.draw(done)
        rollouts, redrawn = redraw_equal(drawn, source, {'train': everything}, config, done)
        ahead.trained()
        found.append((rollouts, redrawn, ahead.get_state()))
    return found


def test_steps_that_are_drawn_ahead_have_numbers_and_redraws_of_their_own(tmp_path):
    """Step n has the numbers 5 n to 5 n + 2, drawn up to two steps before, and two for redraws."""
    config = recipe(limit=2)
    config.max_staleness = 2
    unequal = {f'task-{i}' for i in range(0, 30, 2)}
    source = StoredSource(RolloutStore(tmp_path / 'store'), unequal)
    whole = steps_of(source, config)
    ahead = [due for due in source.posted if due.first_group % 5 == 0]
    # Three steps before the first, then one in each step until the last is posted.
    assert [(due.first_group, due.version) for due in ahead] == [
        *((0, 0), (5, 0), (10, 0), (15, 1), (20, 2), (25, 3))
    ]
    again = [due for due in source.posted if due not in ahead]
    assert again and all(due.first_group % 5 in (3, 4) for due in again)
    # What is drawn anew is of the step's own weights, however old the others are.
    assert all(due.version == due.first_group // 5 for due in again)
    assert len(source.drawn) == len(set(source.drawn))
    for done, (rollouts, redrawn, _) in enumerate(whole):
        assert len(rollouts) == 6 and {i // 5 for i in ids(rollouts)} == {done}
        equal = [r for r in rollouts if r.task_id not in unequal]
        assert redrawn['rollout/equal_groups'] == len(equal) / 2
        assert not equal or redrawn['rollout/redrawn_groups'] == 2
        staleness = rollout_metrics(rollouts, done).get('rollout/max_staleness', 0)
        assert staleness <= min(done, 2)
    assert sum(redrawn['rollout/redrawn_groups'] for _, redrawn, _ in whole) > 4
    assert max(rollout_metrics(r, n)['rollout/max_staleness'] for n, (r, _, _) in enumerate(whole))
    # A run that is resumed after step 3 finds what was drawn ahead, and learns from the same.
    first = StoredSource(RolloutStore(tmp_path / 'other'), unequal)
    begun = steps_of(first, config, last=3)
    resumed = StoredSource(first.store, unequal)
    went_on = steps_of(resumed, config, state=begun[-1][2], first=3)
    assert [(ids(r), m) for r, m, _ in begun + went_on] == [(ids(r), m) for r, m, _ in whole]
    assert sorted(first.drawn + resumed.drawn) == sorted(source.drawn)
