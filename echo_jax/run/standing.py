"""Where a run stands, by what it has written: its steps, who waits for whom, what fails.

It reads a folder or a bucket and writes nothing; status and view show it. Nothing of it needs JAX.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import tensorstore as ts

from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import read_claims
from echo_jax.store.due import DueStore
from echo_jax.store.kvstore import open_kvstore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Status

RECENT = 20  # steps that shares, times and failures are of
Columns = Mapping[str, Sequence[float]]  # the numbers of the last rows that have them, by name


def look(work: Workdir) -> dict[str, Any]:
    """All that status prints; a number that is not known (yet) is None."""
    kvstore, now, config = open_kvstore(work.url()), time.time(), work.config
    recent = columns_of(read_rows(kvstore, 'metrics.jsonl', RECENT))
    found, since = standing(kvstore, recent), changed(work)
    has_workers = config.policy.backend == 'vllm'
    warm = read_rows(kvstore, 'warm_start.jsonl', 1)
    reports = workers(work) if has_workers else []
    for each in reports:
        each['seconds_ago'] = now - each.get('at', now)
        is_late = each['seconds_ago'] > config.policy.lease_sec
        each['silent'] = is_late and not found['finished']
    return {
        'run': work.url(),
        'now': now,
        **found,
        'warm_start_step': warm[-1]['step'] if warm else None,
        'seconds_since_a_step': None if since is None else now - since,
        'queue': queue(work) if has_workers else None,
        'disk': disk(work),
        'workers': reports,
    }


def read_rows(kvstore: ts.KvStore, key: str, count: int) -> list[dict[str, float]]:
    """The last rows of metrics.jsonl or warm_start.jsonl; none if it is not there."""
    found = kvstore.read(key).result()
    lines = found.value.splitlines(keepends=True) if found.state == 'value' else []
    whole = [line for line in lines[-count - 1 :] if line.endswith(b'\n')]
    return [json.loads(line) for line in whole[-count:]]


def columns_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row[name] for row in rows if name in row] for name in names}


def standing(kvstore: ts.KvStore, recent: Columns) -> dict[str, Any]:
    """What the last rows and summary.json say; a number that is not known (yet) is None.

    recent: of the last RECENT rows of metrics.jsonl, `step` among them.
    """
    steps = [int(step) for step in recent.get('step', ())]
    step = steps[-1] if steps else 0
    config = _document(kvstore, 'config.json')  # the run may have been made longer meanwhile
    # With num_epochs the number of steps depends on the tasks, which are not read here.
    total = None if config.get('num_epochs') else config.get('num_steps')
    summary = _document(kvstore, 'summary.json')
    parts = (mean(recent, 'time/sampling') or 0.0) + (mean(recent, 'time/learning') or 0.0)
    seconds = mean(recent, 'time/step') or parts or None
    left = seconds * (total - step) if seconds is not None and total is not None else None
    return {
        'step': step,
        'steps': summary.get('steps') if summary else total,
        'finished': bool(summary),
        'seconds_left': None if summary else last(recent, 'time/left') or left,
        'seconds_a_step': seconds,
        'learner_idle': share(recent, 'time/sampling', 'time/step'),
        'learned_tokens_per_sec': _learned(recent),
        'sampled_tokens_per_sec': last(recent, 'system/sampled_tokens_per_sec'),
        'engine_idle': {name: last(recent, key) for name, key in _below(recent, 'engine_idle')},
        'ages': {int(age): mean(recent, key) for age, key in _below(recent, 'age', 'rollout')},
        'statuses': {
            status.value: int(sum(recent.get(f'rollout/status/{status}', ()))) for status in Status
        },
        'errors': {kind: int(sum(recent[key])) for kind, key in _below(recent, 'error', 'rollout')},
        'late_groups': int(sum(recent.get('rollout/late_groups', ()))),
        'damaged_groups': int(last(recent, 'system/damaged_groups') or 0),
        'recent_steps': len(steps),
        'rollouts_of': config.get('logging', {}).get('rollouts'),
        'summary': summary,
    }


def _document(kvstore: ts.KvStore, name: str) -> dict:
    found = kvstore.read(name).result()
    return json.loads(found.value) if found.state == 'value' else {}


def mean(columns: Columns, name: str) -> float | None:
    values = columns.get(name)
    return sum(values) / len(values) if values else None


def last(columns: Columns, *names: str) -> float | None:
    """The newest value of the first of these names that has any."""
    there = [columns[name] for name in names if name in columns]
    return there[0][-1] if there else None


def share(columns: Columns, part: str, whole: str) -> float | None:
    total = sum(columns.get(whole, ()))
    return sum(columns.get(part, ())) / total if total else None


def _learned(columns: Columns) -> float | None:
    """Tokens a second of all the steps together, of which the first may have compiled for long."""
    rates = columns.get('system/learned_tokens_per_sec', ())
    seconds = columns.get('time/learning', ())[-len(rates) :]  # of rows that older code wrote: more
    tokens = sum(rate * part for rate, part in zip(rates, seconds))
    return tokens / sum(seconds) if rates else None


def _below(columns: Columns, name: str, group: str = 'system') -> list[tuple[str, str]]:
    """(KEY, the whole name) of each column `GROUP/NAME/KEY`."""
    start = f'{group}/{name}/'
    return [(key.removeprefix(start), key) for key in sorted(columns) if key.startswith(start)]


def workers(work: Workdir) -> list[dict[str, Any]]:
    """What each worker last said of itself."""
    return DueStore(work.url('fleet')).reports()


def changed(work: Workdir) -> float | None:
    """When metrics.jsonl last changed, seconds since 1970; None in a bucket, or without one."""
    file = work.path / 'metrics.jsonl'
    is_folder = work.url() == str(work.path)
    return file.stat().st_mtime if is_folder and file.exists() else None


def queue(work: Workdir) -> dict[str, int]:
    """The groups that are due: how many are drawn now, are whole, or have nobody yet.

    A group that was claimed by a worker that has died counts as drawn until its lease has run out
    and another worker has it.
    """
    counts = dict.fromkeys(('due', 'drawn', 'whole', 'free'), 0)
    for due in DueStore(work.url('fleet')).listed():
        missing = {*RolloutStore(work.url('rollouts', due.store)).missing(due.group_ids)}
        drawn = missing & read_claims(work.url('fleet'), due.store).keys()
        counts['due'] += len(due.group_ids)
        counts['whole'] += len(due.group_ids) - len(missing)
        counts['drawn'] += len(drawn)
        counts['free'] += len(missing - drawn)
    return counts


def disk(work: Workdir) -> dict[str, int] | None:
    """Bytes of a run's files by what they are, and 'free' on their file system; None in a bucket.

    It looks at every file, which takes a second for 100,000 of them on a local disk.
    """
    if work.url() != str(work.path):
        return None
    sizes = dict.fromkeys(('rollouts', 'weights', 'checkpoints', 'rest'), 0)
    for folder, _, names in os.walk(work.path):
        top = pathlib.Path(folder).relative_to(work.path).parts[:1]
        kind = top[0] if top and top[0] in sizes else 'rest'
        for name in names:
            try:
                sizes[kind] += os.lstat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # removed meanwhile
                continue
    return sizes | {'free': shutil.disk_usage(work.path).free}
