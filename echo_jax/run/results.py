"""The results of an evaluation: kept as they come, summed up, and compared with another one's.

`--output=eval.json` has `eval.jsonl` beside it, a line of settings and then one a result, and for a
policy `eval.rollouts`, a rollout store. With these the same command goes on where it was stopped.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from echo_jax.run.changes import difference
from echo_jax.run.intervals import (
    Difference,
    Estimate,
    check_same_tasks,
    mean_difference,
    mean_of_shares,
)
from echo_jax.run.measures import pass_at_k
from echo_jax.run.workdir import whole_rows, write_whole
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import SOLVED_REWARD, Rollout, Status, Task

Result = dict[str, Any]  # 'task_id', 'sample_id', 'reward', 'correct', 'status', 'reason', 'turns'


def make_result(
    task_id: str, sample_id: int, reward: float, status: Status, reason: str, turns: int
) -> Result:
    return {
        'task_id': task_id,
        'sample_id': sample_id,
        'reward': reward,
        'correct': bool(reward >= SOLVED_REWARD),
        'status': str(status),
        'reason': reason,  # of an infra_error or a verifier_error
        'turns': turns,
    }


def result_of(r: Rollout) -> Result:
    return make_result(r.task_id, r.sample_id, r.reward, r.status, r.reason, len(r.turn_starts))


class Results:
    """The results that there are, also in a file beside `output` if there is one."""

    def __init__(self, output: pathlib.Path | None, settings: Mapping[str, Any]):
        """Reads what an evaluation with the same settings has left there.

        Raises ValueError if it had other settings.
        """
        self._file = output and output.with_suffix('.jsonl')
        self.rollouts = RolloutStore(output.with_suffix('.rollouts') if output else 'memory://')
        self._settings = json.loads(json.dumps(settings))
        self.found: list[Result] = []
        if self._file and self._file.exists():
            try:
                theirs, *self.found = whole_rows(self._file.read_text())
                differs = '' if theirs == self._settings else difference(theirs, self._settings)
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(
                    f'{self._file} is no file of results ({error}); give another --output'
                ) from error
            if differs:
                raise ValueError(
                    f'{self._file} holds results of another evaluation ({differs}); give another '
                    '--output, or remove it'
                )

    def replace(self, results: Iterable[Result]) -> None:
        """Makes these the results that there are."""
        self.found = list(results)
        if self._file:
            lines = [json.dumps(line) + '\n' for line in (self._settings, *self.found)]
            write_whole(self._file, ''.join(lines))

    def add(self, result: Result) -> None:
        self.found.append(result)
        if self._file:
            with self._file.open('a') as file:
                file.write(json.dumps(result) + '\n')


def pass_rates(results: Sequence[Result], samples: int) -> dict[str, Estimate]:
    """{'1': pass@1, '2': pass@2, '4': ...}, in powers of two up to `samples`, means over tasks.

    An INFRA_ERROR is nobody's result: a task with fewer than k others has no part in pass@k.
    """
    by_task = list(_corrects(results).values())
    rates = {}
    for k in (2**i for i in range(samples.bit_length())):
        shares = [pass_at_k(corrects, k) for corrects in by_task if len(corrects) >= k]
        if shares:
            rates[str(k)] = mean_of_shares(shares)
    return rates


def rates_by(
    results: Sequence[Result], samples: int, tasks: Sequence[Task], keys: Sequence[str]
) -> dict[str, dict[str, dict]]:
    """For each key, 'source' or one of [metadata] of task.toml, its values with their tasks' rates.

    A task that lacks the key counts under ''. Raises ValueError for a key that no task has.
    """
    known = {'source', *(key for task in tasks for key in task.metadata)}
    if unknown := [key for key in keys if key not in known]:
        raise ValueError(f'--by: no task has {unknown}; there are {sorted(known)}')
    found: dict[str, dict[str, dict]] = {}
    for key in keys:
        values: dict[str, set[str]] = {}
        for task in tasks:
            value = task.source if key == 'source' else task.metadata.get(key, '')
            values.setdefault(str(value), set()).add(task.task_id)
        found[key] = {
            value: {
                'tasks': len(ids),
                'pass@k': as_json(pass_rates([r for r in results if r['task_id'] in ids], samples)),
            }
            for value, ids in sorted(values.items())
        }
    return found


def read_other(file: str, tasks: Sequence[Task]) -> list[Result]:
    """The results of another evaluation of these tasks, out of its eval.json.

    Raises ValueError if it is no evaluation, or one of other tasks.
    """
    try:
        theirs = json.loads(pathlib.Path(file).read_text())['results']
        there = _corrects(theirs).keys()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f'--against={file} is no result of echo_jax.evaluate ({error}); name its --output'
        ) from error
    try:
        check_same_tasks([task.task_id for task in tasks], there)
    except ValueError as error:
        raise ValueError(f'--against={file}: {error}') from error
    return theirs


def compared(results: Sequence[Result], theirs: Sequence[Result]) -> Difference | None:
    """The solve rate less theirs, paired by task; None if no task has a result in both.

    A task whose results are all INFRA_ERRORs, here or there, is left out.
    """
    here, there = _corrects(results), _corrects(theirs)
    tasks = [task for task in here if here[task] and there.get(task)]
    if not tasks:
        return None
    rates = ({task: float(np.mean(corrects[task])) for task in tasks} for corrects in (here, there))
    return mean_difference(*rates)


def as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: estimate._asdict() for name, estimate in estimates.items()}


def _corrects(results: Sequence[Result]) -> dict[str, list[bool]]:
    """Whether each sample of a task was correct, without those that are INFRA_ERRORs."""
    by_task: dict[str, list[bool]] = {}
    for result in results:
        corrects = by_task.setdefault(result['task_id'], [])
        if result['status'] != Status.INFRA_ERROR:
            corrects.append(result['correct'])
    return by_task
