"""The index of rollouts: what is read, in which order, and what cannot be."""

import pytest

from echo_jax.store.kvstore import MissingError
from echo_jax.types import TokenScores
from echo_jax.viewer.index import Index
from tests.support.viewed_run import make_run, scores_of, write_group, write_scores


def column(index, name):
    return index.rows.document(0)['columns'][name]


@pytest.fixture
def work(tmp_path):
    return make_run(tmp_path / 'run')


def test_a_row_says_what_a_rollout_was(work):
    write_group(work, 5)
    index = Index(work)
    assert index.look() is False
    columns = index.rows.document(0)['columns']
    assert {name: values[2] for name, values in columns.items()} == {
        'store': 'train',
        'task': 'task-1',
        'step': 3,  # groups 4 and 5 are those of step 3
        'group': 5,
        'sample': 2,
        'reward': 0.0,
        'status': 'infra_error',
        'reason': 'the sandbox did not start',
        'turns': 1,
        'tokens': columns['tokens'][2],
        'stop': 'done',
    }
    assert columns['stop'] == ['done', 'max_turns', 'done'] and columns['turns'] == [2, 3, 1]


def test_the_newest_groups_of_training_come_first_and_only_new_ones_later(work):
    for store, group_id in (('heldout_after', 0), ('train', 0), ('train', 7), ('train', 3)):
        write_group(work, group_id, store)
    index = Index(work)
    index.look()
    assert column(index, 'group')[::3] == [7, 3, 0, 0]
    assert column(index, 'store')[-1] == 'heldout_after' and column(index, 'step')[-1] is None
    write_group(work, 8)
    index.look()
    assert column(index, 'group')[::3] == [7, 3, 0, 0, 8]
    assert (index.found, index.read) == (5, 5)


def test_what_is_damaged_is_named_and_read_when_it_is_whole(work):
    write_group(work, 0)
    write_group(work, 1)
    file = work.path / 'rollouts' / 'train' / 'groups' / f'{1:012d}'
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    index = Index(work)
    assert index.look() is False and column(index, 'group') == [0, 0, 0]
    [problem] = index.problems.values()
    assert 'group 1 in' in problem and 'is corrupt' in problem
    file.write_bytes(whole)
    index.look()
    assert index.problems == {} and column(index, 'group') == [0, 0, 0, 1, 1, 1]


def test_surprise_is_the_mean_ce_of_the_terminals_output(work):
    group = write_group(work, 0, scored=True)
    index = Index(work)
    index.look()
    found = index.surprises.document(0)['columns']
    # Rollout 2 ran no command. Token i has the CE 0.5 + i / 100.
    assert found['row'] == [0, 1]
    for rollout, surprise in zip(group, found['surprise']):
        places = [i for i, role in enumerate(rollout.roles) if role == 6]
        assert surprise == pytest.approx(0.5 + sum(places) / len(places) / 100, abs=2e-3)


def test_scores_that_come_later_reach_their_rows(work):
    groups = [write_group(work, group_id) for group_id in (0, 1)]
    index = Index(work)
    index.look()
    assert len(index.surprises) == 0
    write_scores(work, groups[0])
    index.look()
    assert index.surprises.document(0)['columns']['row'] == [3, 4]  # group 0 was read second
    index.look()
    assert len(index.surprises) == 2


def test_scores_of_another_length_are_no_surprise(work):
    group = write_group(work, 0)
    short = TokenScores(*(array[:-1] for array in scores_of(group[0])))
    index = Index(work)
    index.scores.write_group(0, {0: short})
    index.look()
    assert len(index.surprises) == 0


def test_damaged_scores_are_named_and_the_rollouts_are_there(work):
    write_group(work, 0, scored=True)
    file = work.path / 'scores' / 'train' / 'groups' / f'{0:012d}'
    file.write_bytes(file.read_bytes()[:-9])
    index = Index(work)
    assert index.look() is False and column(index, 'group') == [0, 0, 0]
    [problem] = index.problems.values()
    assert 'scores of group 0' in problem and len(index.surprises) == 0


def test_a_group_that_was_removed_is_no_problem(work):
    write_group(work, 0)
    file = work.path / 'rollouts' / 'train' / 'groups' / f'{0:012d}'
    file.write_bytes(b'')
    index = Index(work)
    index.look()
    assert len(index.problems) == 1
    file.unlink()
    index.look()
    assert index.problems == {} and index.found == 0


def test_only_stores_of_the_run_can_be_opened(work):
    write_group(work, 0)
    index = Index(work)
    index.look()
    assert index.store('train').groups() == [0]
    for name in ('..', '../train', 'other'):
        with pytest.raises(MissingError):
            index.store(name)
