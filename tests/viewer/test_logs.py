"""Logs: what a page gets of metrics.jsonl and of the table, part after part."""

import json

from echo_jax.store.kvstore import open_kvstore
from echo_jax.viewer.logs import CHUNK, MetricsLog, Table


def write(folder, rows, end=''):
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows) + end)


def test_rows_come_from_where_the_page_stands(tmp_path):
    log = MetricsLog(open_kvstore(tmp_path))
    assert log.document(0)['total'] == 0
    rows = [{'step': 1, 'a': 0.5}, {'step': 2, 'a': 1.5, 'b': 2.0}]
    write(tmp_path, rows, end='{"step": 3, "a"')  # the learner is writing this line
    first = log.document(0)
    assert (first['total'], first['count'], first['start']) == (2, 2, 0)
    assert first['columns'] == {'step': [1, 2], 'a': [0.5, 1.5], 'b': [None, 2.0]}
    write(tmp_path, [*rows, {'step': 3, 'b': 4.0}])
    second = log.document(2)
    assert second['columns'] == {'step': [3], 'b': [4.0]}  # none of these rows has an a
    assert (second['epoch'], second['total']) == (first['epoch'], 3)
    assert log.document(3)['count'] == 0


def test_rows_that_a_resumed_run_took_back_are_another_log(tmp_path):
    log = MetricsLog(open_kvstore(tmp_path))
    write(tmp_path, [{'step': step, 'a': step} for step in (1, 2, 3)])
    before = log.document(0)
    write(tmp_path, [{'step': 1, 'a': 1}])
    after = log.document(3)
    assert after['epoch'] != before['epoch'] and (after['total'], after['count']) == (1, 0)
    write(tmp_path, [{'step': 1, 'a': 1}, {'step': 2, 'a': 20}])
    assert log.document(0)['epoch'] == after['epoch']  # it grew
    assert log.document(0)['columns']['a'] == [1, 20]


def test_the_last_rows_have_the_numbers_that_are_there(tmp_path):
    log = MetricsLog(open_kvstore(tmp_path))
    write(tmp_path, [{'step': 1, 'a': 1.0, 'c': 9.0}, {'step': 2, 'b': 2.0}, {'step': 3, 'a': 3.0}])
    assert log.last(2) == ([2, 3], {'a': [3.0], 'b': [2.0]})


def test_a_name_of_the_tests_is_made_visible(tmp_path):
    log = MetricsLog(open_kvstore(tmp_path))
    write(tmp_path, [{'step': 1, 'rollout/reward/\u202ex': 1.0}])
    assert list(log.document(0)['columns']) == ['step', 'rollout/reward/<U+202E>x']


def test_long_logs_come_in_parts(tmp_path):
    write(tmp_path, [{'step': step, 'a': 0.0} for step in range(2500)])
    log = MetricsLog(open_kvstore(tmp_path))
    assert [log.document(start)['count'] for start in (0, 1000, 2000)] == [1000, 1000, 500]
    table = Table('n', 'square')
    for n in range(CHUNK + 3):
        table.append(n, n * n)
    assert table.document(0)['count'] == CHUNK and table.document(0)['total'] == CHUNK + 3
    assert table.document(CHUNK)['columns']['n'] == [CHUNK, CHUNK + 1, CHUNK + 2]
