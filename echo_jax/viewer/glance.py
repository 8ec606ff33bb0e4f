"""How a run is, in a few numbers: where it stands, what it waits for, what fails."""

import collections
import json

import tensorstore as ts

from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueStore
from echo_jax.store.kvstore import CorruptError
from echo_jax.types import Status
from echo_jax.viewer.index import Index
from echo_jax.viewer.logs import MetricsLog
from echo_jax.viewer.text import number, visible

_RECENT = 20  # steps that shares and times are means of
_REASONS = 5  # the most frequent reasons that are named


def glance(
    work: Workdir, kvstore: ts.KvStore, metrics: MetricsLog, index: Index, now: float
) -> dict:
    """The document; a number that the run has not written yet is None.

    `now` is in seconds since 1970; it is there so that a page can say how long ago things were.
    """
    steps, recent = metrics.last(_RECENT)
    step, config = (steps[-1] if steps else 0), work.config
    now_config = _document(kvstore, 'config.json')  # the run may have been made longer meanwhile
    # With num_epochs the number of steps depends on the tasks, which are not read here.
    total = None if now_config.get('num_epochs') else now_config.get('num_steps')
    summary = _summary(kvstore)
    sampling, learning = (_mean(recent, f'time/{name}') or 0.0 for name in ('sampling', 'learning'))
    seconds = sampling + learning or None
    finished = bool(summary)
    is_known = seconds is not None and total is not None and not finished
    return {
        'step': step,
        'steps': summary.get('steps') if finished else total,
        'finished': finished,
        'seconds_left': seconds * (total - step) if is_known else None,
        'seconds_a_step': seconds,
        'sampling_share': sampling / seconds if seconds else None,
        'learning_share': learning / seconds if seconds else None,
        'workers_sample': config.policy.backend == 'vllm',
        'reward': _last(recent, 'rollout/reward'),
        'env_ce': _last(recent, 'train/env_ce/output', 'train/env_ce'),
        'staleness': _last(recent, 'rollout/staleness'),
        'max_staleness': _last(recent, 'rollout/max_staleness'),
        'statuses': {
            status.value: int(sum(recent.get(f'rollout/status/{status}', ()))) for status in Status
        },
        'recent_steps': len(steps),
        'reasons': _reasons(index),
        'summary': summary,
        'workers': _workers(work),
        'now': now,
        'changed': _changed(work, metrics),
        'groups_found': index.found,
        'groups_read': index.read,
        'rollouts': len(index.rows),
        'rollouts_of': now_config.get('logging', {}).get('rollouts'),
        'problems': list(index.problems.values())[:20],
        'problem_count': len(index.problems),
    }


def _changed(work: Workdir, metrics: MetricsLog) -> float:
    """When metrics.jsonl last changed, seconds since 1970; in a bucket, when that was seen."""
    file = work.path / 'metrics.jsonl'
    return (
        file.stat().st_mtime if work.url() == str(work.path) and file.exists() else metrics.changed
    )


def _mean(columns: dict[str, list[float]], name: str) -> float | None:
    values = columns.get(name)
    return number(sum(values) / len(values)) if values else None


def _last(columns: dict[str, list[float]], *names: str) -> float | None:
    """The newest value of the first of these names that has any."""
    there = [columns[name] for name in names if name in columns]
    return number(there[0][-1]) if there else None


def _summary(kvstore: ts.KvStore) -> dict:
    """summary.json, which a finished run has."""
    document = _document(kvstore, 'summary.json')
    return {visible(name): number(value) for name, value in document.items()}


def _document(kvstore: ts.KvStore, name: str) -> dict:
    found = kvstore.read(name).result()
    return json.loads(found.value) if found.state == 'value' else {}


def _reasons(index: Index) -> list[list]:
    """[status, reason, rollouts] of what has no reward of the tests, most frequent first."""
    status, reason = (index.rows.columns.index(name) for name in ('status', 'reason'))
    rows = [row for row in index.rows.rows() if row[reason]]
    counts = collections.Counter((row[status], row[reason]) for row in rows)
    return [[*key, count] for key, count in counts.most_common(_REASONS)]


def _workers(work: Workdir) -> list[dict]:
    try:
        reports = DueStore(work.url('fleet')).reports()
    except CorruptError as error:
        return [{'worker': f'a report cannot be read: {visible(str(error))}'}]
    return [
        {
            visible(str(name)): visible(value) if isinstance(value, str) else value
            for name, value in report.items()
        }
        for report in reports
    ]
