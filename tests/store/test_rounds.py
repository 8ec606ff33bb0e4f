"""Rounds and reports on a real TensorStore folder."""

import dataclasses
import time

import pytest

from echo_jax.store.kvstore import CorruptError
from echo_jax.store.rounds import Round, RoundStore

TRAIN = Round('train', 'train', 8, ('a', 'b', 'a'), group_size=4, temperature=0.8, version=2)
HELDOUT = Round('heldout_before', 'heldout', 0, ('h',), group_size=1, temperature=0.0, version=0)


@pytest.fixture(params=['folder', 'memory'])
def rounds(request, tmp_path) -> RoundStore:
    return RoundStore(tmp_path / 'fleet' if request.param == 'folder' else 'memory://')


def test_a_round_numbers_its_groups():
    assert list(TRAIN.group_ids) == [8, 9, 10]
    assert TRAIN.assignments == [(8, 'a'), (9, 'b'), (10, 'a')]  # a task may come twice


def test_what_is_posted_is_due_until_it_is_withdrawn(rounds):
    assert rounds.due() == []
    later = dataclasses.replace(TRAIN, first_group=11, version=3)
    for round_ in (later, TRAIN, HELDOUT, TRAIN):
        rounds.post(round_)
    assert rounds.due() == [HELDOUT, TRAIN, later]  # as they were, floats and tuples included
    rounds.withdraw(TRAIN)
    rounds.withdraw(TRAIN)
    assert rounds.due() == [HELDOUT, later]


def test_a_learner_that_starts_leaves_nothing_of_the_last_one_due(rounds):
    rounds.post(TRAIN)
    rounds.post(HELDOUT)
    rounds.report('w', {'version': 1})
    rounds.clear()
    assert rounds.due() == []
    assert [report['worker'] for report in rounds.reports()] == ['w']


def test_workers_end_when_the_learner_has_finished(rounds):
    assert not rounds.finished()
    rounds.finish()
    assert rounds.finished()


def test_a_report_takes_the_place_of_the_last(rounds):
    rounds.report('b', {'version': 1, 'episodes': 12345})
    rounds.report('b', {'version': 2})
    rounds.report('a-0', {'version': 7})
    first, second = rounds.reports()
    assert (first['worker'], first['version']) == ('a-0', 7)
    assert (second['worker'], second['version']) == ('b', 2) and 'episodes' not in second
    assert abs(second['at'] - time.time()) < 60


def test_what_a_killed_writer_left_is_no_round(tmp_path):
    rounds = RoundStore(tmp_path)
    rounds.post(TRAIN)
    folder = tmp_path / 'rounds' / 'train'
    (folder / f'{8:012d}.__lock').write_bytes(b'half of a do')
    assert rounds.due() == [TRAIN]
    (folder / f'{8:012d}').write_bytes(b'half of a do')
    with pytest.raises(CorruptError, match='checksum'):
        rounds.due()
