"""What the study keeps of a finished run: its curves, and what became of every held-out task."""

import collections
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from echo_jax.agent.protocol import Protocol
from echo_jax.run.numbering import LEDGER, groups_of_step, may_be_late
from echo_jax.run.workdir import Workdir, whole_rows
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import demonstration
from echo_jax.types import SOLVED_REWARD, Role, Rollout, Status, Task

# Of each step, if it has them.
SERIES = (
    'rollout/reward',
    'rollout/uninformative_groups',
    'train/entropy',
    'train/reference_kl',
    'train/grad_norm',
    'train/grad_norm_policy',
    'train/grad_norm_env',
    'train/grad_cosine',
    'train/env_ce/output',
    'eval/env_ce/output',
    'rollout/imagined',
)
DIGITS = 5  # after the point
# No command of these worlds takes long, and no test of theirs fails to give a reward. So an episode
# that ends like this was one on a machine that gave it too little of its time, and its reward is
# the machine's and not the agent's.
SPOILED = (Status.AGENT_TIMEOUT, Status.VERIFIER_ERROR, Status.INFRA_ERROR)


def spoiled(folder: pathlib.Path) -> str:
    """How many training episodes of a run ended for want of the machine's time, up to now, on one
    line for a person; '' if none did.
    """
    file, counts = folder / 'metrics.jsonl', collections.Counter[str]()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    bad = []
    for row in rows:
        found = {status: int(row[f'rollout/status/{status}']) for status in SPOILED}
        if any(found.values()):
            bad.append(row['step'])
            counts.update({status: count for status, count in found.items() if count})
    if not bad:
        return ''
    kinds = ', '.join(f'{count} with {status}' for status, count in counts.items())
    return f'episodes of steps {bad[0]} to {bad[-1]} ended {kinds}: this machine was too busy'


def read_run(work: Workdir) -> dict:
    """What the report needs to know of a finished run.

    'series' holds for each metric [[step, value], ...]; 'heldout' for each task, in their order,
    the number of its tools, and before and after training whether it was solved, and whether the
    first command was right: 1 or 0.
    """
    rows = [json.loads(line) for line in (work.path / 'metrics.jsonl').read_text().splitlines()]
    series = {
        key: [[row['step'], round(row[key], DIGITS)] for row in rows if key in row]
        for key in SERIES
    }
    heldout = work.tasks('heldout')
    first = FirstCommands(work)
    outcomes = {}
    for when in ('before', 'after'):
        store = RolloutStore(work.url('rollouts', f'heldout_{when}'))
        rollouts = [r for (r,) in store.read_groups(range(len(heldout)))]
        outcomes[when] = {
            'solved': [int(r.reward >= SOLVED_REWARD) for r in rollouts],
            'first_right': [int(first.right(r)) for r in rollouts],
        }
    series['rollout/first_right'] = first.of_training(len(rows))
    return {
        'summary': json.loads((work.path / 'summary.json').read_text()),
        'series': {key: points for key, points in series.items() if points},
        'heldout': {'tools': [count_tools(task) for task in heldout], **outcomes},
    }


def dumps(results: list[dict]) -> str:
    """results.json, a run a line."""
    return '[\n' + ',\n'.join(json.dumps(r, separators=(',', ':')) for r in results) + '\n]\n'


def count_tools(task: Task) -> int:
    """How many commands a task's solution has: on the machine, one for each tool that it names."""
    return len(demonstration(task)) - 1


class FirstCommands:
    """Which rollouts of a run begin with the first command of their task's solution."""

    def __init__(self, work: Workdir):
        self._work = work
        self._protocol = Protocol(work.tokenizer(), work.config.protocol)
        self._wanted = {
            task.task_id: demonstration(task)[0][1]
            for split in ('train', 'heldout')
            for task in work.tasks(split)
        }

    def right(self, rollout: Rollout) -> bool:
        return first_command(rollout, self._protocol) == self._wanted[rollout.task_id]

    def of_training(self, steps: int) -> list[list[float]]:
        """[[step, share of the step's rollouts that begin right], ...]."""
        store = RolloutStore(self._work.url('rollouts', 'train'))
        points = []
        for step, numbers in enumerate(trained_groups(self._work, steps)):
            groups = store.read_groups(numbers)
            share = np.mean([self.right(rollout) for group in groups for rollout in group])
            points.append([step + 1, round(float(share), DIGITS)])
        return points


def trained_groups(work: Workdir, steps: int) -> list[Sequence[int]]:
    """The numbers of the groups that each of the first steps trained on."""
    if may_be_late(work.config):
        rows = whole_rows((work.path / LEDGER).read_text())
        return [row['groups'] for row in rows[:steps]]
    size = groups_of_step(work.config)
    return [range(step * size, (step + 1) * size) for step in range(steps)]


def first_command(rollout: Rollout, protocol: Protocol) -> str | None:
    """The command that the first turn of a rollout asks for; None if it asks for none."""
    if not len(rollout.turn_starts):
        return None
    written = rollout.roles[rollout.turn_starts[0] :] == Role.ACTION
    length = len(written) if written.all() else int(written.argmin())
    turn = rollout.tokens[rollout.turn_starts[0] :][:length]
    commands = protocol.select(protocol.read_turn(turn)[0].commands)
    return commands[0].arguments.get('command') if commands else None
