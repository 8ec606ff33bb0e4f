"""What an evaluation keeps, sums up and compares."""

import json
import pathlib

import pytest

from echo_jax.run.results import Results, compared, make_result, pass_rates, rates_by, read_other
from echo_jax.types import Status, Task


def results(corrects: dict[str, list[bool]], failed: tuple[str, ...] = ()) -> list[dict]:
    found = [
        make_result(task, i, float(correct), Status.OK, '', 1)
        for task, many in corrects.items()
        for i, correct in enumerate(many)
    ]
    return found + [make_result(task, 9, 0.0, Status.INFRA_ERROR, 'no disk', 0) for task in failed]


def test_pass_rates_are_means_over_tasks():
    corrects = {'a': [True, False, False], 'b': [False, False, False], 'c': [True, True, True]}
    rates = pass_rates(results(corrects), 3)
    # Powers of two up to 3 samples. Task a: 1/3, and 1 - C(2,2)/C(3,2) = 2/3.
    means = {k: rate.mean for k, rate in rates.items()}
    assert means == pytest.approx({'1': (1 / 3 + 1) / 3, '2': (2 / 3 + 1) / 3})
    assert all(rate.low < rate.mean < rate.high for rate in rates.values())


def test_infra_errors_count_in_no_rate():
    found = results({'a': [True, True], 'b': [False, True]}, failed=('a', 'b', 'c'))
    assert pass_rates(found, 2) == pass_rates(results({'a': [True, True], 'b': [False, True]}), 2)
    only_one = results({'a': [True, True], 'b': [False]}, failed=('b',))
    assert pass_rates(only_one, 2)['2'].mean == 1.0  # b has one sample, too few for pass@2


def test_rates_by_source_and_metadata():
    tasks = [
        Task('a', pathlib.Path(), '', metadata={'difficulty': 'hard', 'year': 2026}, source='one'),
        Task('b', pathlib.Path(), '', metadata={'difficulty': 'easy'}, source='one'),
        Task('c', pathlib.Path(), '', metadata={'difficulty': 'hard'}, source='two'),
    ]
    found = results({'a': [True], 'b': [False], 'c': [False]})
    by = rates_by(found, 1, tasks, ['difficulty', 'source', 'year'])
    shown = {
        key: {value: (one['tasks'], one['pass@k']['1']['mean']) for value, one in values.items()}
        for key, values in by.items()
    }
    assert shown == {
        'difficulty': {'easy': (1, 0.0), 'hard': (2, 0.5)},
        'source': {'one': (2, 0.5), 'two': (1, 0.0)},
        'year': {'': (2, 0.0), '2026': (1, 1.0)},
    }
    with pytest.raises(ValueError, match=r"no task has \['level'\]; there are \['difficulty', "):
        rates_by(found, 1, tasks, ['level'])


def tasks_of(found: list[dict]) -> list[Task]:
    return [Task(name, pathlib.Path(), '') for name in {result['task_id'] for result in found}]


def test_comparison_leaves_out_tasks_without_a_result(tmp_path):
    other = tmp_path / 'other.json'
    there = results({'a': [False, False], 'b': [True, True]}, failed=('c',))
    other.write_text(json.dumps({'results': there}))
    here = results({'a': [True, False], 'b': [True, True], 'c': [True, True]})
    found = compared(here, read_other(other, tasks_of(here)))
    assert (found.mean, found.gained, found.lost) == (0.25, ['a'], [])
    assert compared(results({}, failed=('a', 'b', 'c')), there) is None
    one = compared(results({'a': [True]}, failed=('b', 'c')), there)
    assert one[:3] == (1.0, -1.0, 1.0)  # a single task says nothing of others
    with pytest.raises(ValueError, match=r'1 are only here \(d\)'):
        read_other(other, tasks_of([*here, *results({'d': [True]})]))
    for text in ('{}', '[', '{"results": 3}'):
        other.write_text(text)
        with pytest.raises(ValueError, match=r'is no result of echo_jax\.evaluate'):
            read_other(other, tasks_of(here))
    with pytest.raises(ValueError, match=r'is no result of echo_jax\.evaluate'):
        read_other(tmp_path / 'missing.json', tasks_of(here))


def test_results_are_kept_as_they_come(tmp_path):
    output, settings = tmp_path / 'eval.json', {'samples': 2, 'config': {'seed': 0}}
    first, second, third = results({'a': [True, False], 'b': [True]})
    kept = Results(output, settings)
    kept.replace([first])
    kept.add(second)
    with (tmp_path / 'eval.jsonl').open('a') as file:
        file.write('{"task_id": "b", "sam')  # a crash in the middle of a line
    assert Results(output, settings).found == [first, second]
    with pytest.raises(ValueError, match=r'samples is 2 there, 3 here\); give another --output'):
        Results(output, {**settings, 'samples': 3})
    nowhere = Results(None, settings)
    nowhere.add(third)
    assert nowhere.found == [third] and [p.name for p in tmp_path.iterdir()] == ['eval.jsonl']
    for strange in ('[1]\n', 'words\n', ''):
        (tmp_path / 'eval.jsonl').write_text(strange)
        with pytest.raises(ValueError, match=r'eval\.jsonl is no file of results .*another'):
            Results(output, settings)
