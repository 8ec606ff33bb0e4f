"""How a run is, in a few numbers: where it stands, what it waits for, what fails."""

import collections

import tensorstore as ts

from echo_jax.run.standing import RECENT, changed, last, mean, standing, workers
from echo_jax.run.workdir import Workdir
from echo_jax.viewer.index import Index
from echo_jax.viewer.logs import MetricsLog
from echo_jax.viewer.text import number, visible

_REASONS = 5  # the most frequent reasons that are named


def glance(
    work: Workdir, kvstore: ts.KvStore, metrics: MetricsLog, index: Index, now: float
) -> dict:
    """The document; a number that the run has not written yet is None.

    `now` is in seconds since 1970; it is there so that a page can say how long ago things were.
    """
    steps, recent = metrics.last(RECENT)
    stands = standing(kvstore, {'step': steps, **recent})
    sampling, learning = (mean(recent, f'time/{name}') or 0.0 for name in ('sampling', 'learning'))
    seconds = sampling + learning
    names = 'step', 'steps', 'finished', 'statuses', 'recent_steps'
    return {
        **{name: stands[name] for name in names},
        **{name: number(stands[name]) for name in ('seconds_left', 'seconds_a_step')},
        'sampling_share': sampling / seconds if seconds else None,
        'learning_share': learning / seconds if seconds else None,
        'workers_sample': work.config.policy.backend == 'vllm',
        'reward': number(last(recent, 'rollout/reward')),
        'env_ce': number(last(recent, 'train/env_ce/output', 'train/env_ce')),
        'staleness': number(last(recent, 'rollout/staleness')),
        'max_staleness': number(last(recent, 'rollout/max_staleness')),
        'reasons': _reasons(index),
        'summary': {visible(name): number(value) for name, value in stands['summary'].items()},
        'workers': _workers(work),
        'now': now,
        'changed': changed(work) or metrics.changed,
        'groups_found': index.found,
        'groups_read': index.read,
        'rollouts': len(index.rows),
        'rollouts_of': stands['rollouts_of'],
        'problems': list(index.problems.values())[:20],
        'problem_count': len(index.problems),
    }


def _reasons(index: Index) -> list[list]:
    """[status, reason, rollouts] of what has no reward of the tests, most frequent first."""
    status, reason = (index.rows.columns.index(name) for name in ('status', 'reason'))
    rows = [row for row in index.rows.rows() if row[reason]]
    counts = collections.Counter((row[status], row[reason]) for row in rows)
    return [[*key, count] for key, count in counts.most_common(_REASONS)]


def _workers(work: Workdir) -> list[dict]:
    return [
        {
            visible(str(name)): visible(value) if isinstance(value, str) else value
            for name, value in report.items()
        }
        for report in workers(work)
    ]
