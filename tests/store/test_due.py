"""What is due, and the reports of workers, on a real TensorStore folder."""

import dataclasses
import time

import pytest

from echo_jax.store.due import DueGroups, DueStore

TRAIN = DueGroups('train', 'train', 8, ('a', 'b', 'a'), group_size=4, temperature=0.8, version=2)
HELDOUT = DueGroups(
    'heldout_before', 'heldout', 0, ('h',), group_size=1, temperature=0.0, version=0
)


@pytest.fixture(params=['folder', 'memory'])
def due_store(request, tmp_path) -> DueStore:
    return DueStore(tmp_path / 'fleet' if request.param == 'folder' else 'memory://')


def test_due_groups_are_numbered():
    assert list(TRAIN.group_ids) == [8, 9, 10]
    assert TRAIN.assignments == [(8, 'a'), (9, 'b'), (10, 'a')]  # a task may come twice


def test_what_is_posted_is_due_until_it_is_withdrawn(due_store):
    assert due_store.listed() == []
    later = dataclasses.replace(TRAIN, first_group=11, version=3)
    for due in (later, TRAIN, HELDOUT, TRAIN):
        due_store.post(due)
    assert due_store.listed() == [HELDOUT, TRAIN, later]  # as they were, floats and tuples included
    due_store.withdraw(TRAIN)
    due_store.withdraw(TRAIN)
    assert due_store.listed() == [HELDOUT, later]


def test_a_learner_that_starts_leaves_nothing_of_the_last_one_due(due_store):
    due_store.post(TRAIN)
    due_store.post(HELDOUT)
    due_store.report('w', {'version': 1})
    due_store.finish()
    due_store.clear()
    assert due_store.listed() == [] and not due_store.finished()
    assert [report['worker'] for report in due_store.reports()] == ['w']


def test_workers_end_when_the_learner_has_finished(due_store):
    assert not due_store.finished()
    due_store.finish()
    assert due_store.finished()


def test_a_report_takes_the_place_of_the_last(due_store):
    due_store.report('b', {'version': 1, 'episodes': 12345})
    due_store.report('b', {'version': 2})
    due_store.report('a-0', {'version': 7})
    first, second = due_store.reports()
    assert (first['worker'], first['version']) == ('a-0', 7)
    assert (second['worker'], second['version']) == ('b', 2) and 'episodes' not in second
    assert abs(second['at'] - time.time()) < 60
    assert due_store.reports(since=second['at']) == [first, second]
    due_store.report('b', {'at': second['at'] - 30})
    assert due_store.reports(since=second['at']) == [first]


def test_what_a_killed_writer_left_is_not_due(tmp_path):
    due_store = DueStore(tmp_path)
    due_store.post(TRAIN)
    folder = tmp_path / 'due' / 'train'
    (folder / f'{8:012d}.__lock').write_bytes(b'half of a do')
    assert due_store.listed() == [TRAIN]
    (folder / f'{8:012d}').write_bytes(b'half of a do')
    assert due_store.listed() == []  # until who posted it posts it again
