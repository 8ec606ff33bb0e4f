"""Which keys of its config may change when a run goes on, and the record of what changed when.

CHANGEABLE is the table. Every other key is the run's for good: it changes the rollouts that a step
sees, the loss or the schedule. No JAX.
"""

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

from echo_jax.run.inert import flat

HISTORY = 'config_history.jsonl'
Changes = dict[str, list]  # {key: [value before, value now]}


class Changeable(NamedTuple):
    """Keys that may change, since what is learned stays the same up to rounding."""

    keys: tuple[str, ...]  # a section stands for all keys below it
    reason: str
    backends: tuple[str, ...] = ('jax', 'vllm')  # with which policies they may


CHANGEABLE = (
    Changeable(
        ('num_steps', 'num_epochs'), 'upwards: steps that follow change nothing in those before'
    ),
    Changeable(
        ('mesh', 'sharding'), 'the same parameters and the same sums, divided over other devices'
    ),
    Changeable(
        ('batch.micro_rows', 'batch.seq_len', 'batch.pack'),
        'the weight of every token is made before rollouts become rows (docs/design.md#batch)',
    ),
    Changeable(
        ('model.attention', 'model.remat'),
        'other kernels for the same function, and what they keep for its gradient',
    ),
    Changeable(
        ('policy.slots',),
        "how many episodes a worker's engine takes; the embedded policy draws in waves of them, "
        'and other waves have other bits',
        backends=('vllm',),
    ),
    Changeable(
        (
            'policy.tensor_parallel',
            'policy.gpu_memory_utilization',
            'policy.keyframe_every',
            'policy.lease_sec',
            'sandbox.at_once',
        ),
        'how machines are used to draw the same groups from the same weights',
    ),
    Changeable(
        ('eval.balance', 'logging', 'checkpoint', 'warm_start.save_every'),
        'what is measured, written down and kept',
    ),
)


def find_changes(theirs: dict, ours: dict, place: str) -> Changes:
    """The keys in which the config of the run at `place`, `theirs`, and a program's differ.

    Raises ValueError with the first of them that may not change.
    """
    before, now = flat(theirs), flat(ours)
    keys = [key for key in dict.fromkeys([*now, *before]) if _at(now, key) != _at(before, key)]
    backend = {**now, **before}['policy.backend']
    allowed = [name for row in CHANGEABLE if backend in row.backends for name in row.keys]
    for key in keys:
        if not any(f'{key}.'.startswith(f'{name}.') for name in allowed):
            raise ValueError(
                f'{place} is a run of another config ({_compared(key, before, now)}); resume it '
                'with its own, or give another --workdir; when a run goes on, only '
                f'{", ".join(allowed)} may change'
            )
    return {key: [_at(before, key), _at(now, key)] for key in keys}


def check_longer(changes: Changes, config: Mapping, place: str) -> None:
    """Raises ValueError if a learner with these changes would not be the same run made longer.

    A worker or an evaluation does not ask: the length of the run is nothing to them.
    """
    for key in ('num_steps', 'num_epochs'):
        before, now = changes.get(key, (0, 0))
        said = f'{place} is a run of another config ({key} is {before} there, {now} here); '
        if before is None or now is None or now < before:
            raise ValueError(
                f'{said}a run may be made longer and not shorter, in steps if it was in steps and '
                'in epochs if it was in epochs'
            )
        if before < now and config['loss']['env_schedule']['name'] == 'linear':
            raise ValueError(
                f"{said}with loss.env_schedule.name='linear' the steps that there are would have "
                'had other coefficients; give another --workdir for the longer run'
            )


def history_with(history: str, step: int, changes: Changes) -> str:
    """The text of config_history.jsonl with a row more: `changes` hold from `step` on."""
    rows = history.splitlines(keepends=True)
    if rows and json.loads(rows[-1])['changes'] == changes:
        return history  # it was written, and the learner killed before config.json was
    return history + json.dumps({'step': step, 'at': time.time(), 'changes': changes}) + '\n'


def said(changes: Changes) -> str:
    """One line for a person."""
    return ', '.join(f'{key} {before!r} -> {now!r}' for key, (before, now) in changes.items())


def difference(theirs: dict, ours: dict) -> str:
    """The first key in which two trees of settings differ, with both values."""
    theirs, ours = flat(theirs), flat(ours)
    key = next(k for k in [*ours, *theirs] if _at(ours, k) != _at(theirs, k))
    return _compared(key, theirs, ours)


def _compared(key: str, theirs: dict, ours: dict) -> str:
    return f'{key} is {_at(theirs, key)!r} there, {_at(ours, key)!r} here'


def _at(values: dict, key: str) -> object:
    return values.get(key, 'absent')
