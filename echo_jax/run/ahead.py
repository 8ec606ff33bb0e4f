"""Which groups a step trains on, and which are drawn ahead of it.

`Rounds`: each step has its groups by number and waits for all of them, so that nothing depends on
time. `InFlight`: a step trains on the oldest groups that are whole, and a slow one waits for a
later step. Nothing is drawn or trained here.
"""

import collections
import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import ml_collections
import numpy as np

from echo_jax.learner import distributed
from echo_jax.run import report
from echo_jax.run.arrivals import Arrivals
from echo_jax.run.numbering import LEDGER, groups_of_step, may_be_late
from echo_jax.run.sources import Source, WorkerSource
from echo_jax.run.workdir import Workdir, whole_rows, write_whole
from echo_jax.store.due import DueGroups
from echo_jax.tasks.drawing import TaskIterator
from echo_jax.types import Rollout, Task


class GroupsAhead(Protocol):
    """The groups of the next step and of those after it. Every host of a learner has one."""

    def draw(self, done: int) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts of the step after the first `done`, and metrics of how they were chosen.

        Posts those ahead before it waits. Raises Stopped if a stop is requested.
        """
        ...

    def trained(self) -> None:
        """Goes on to the step after the next."""
        ...

    def get_state(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON can hold it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def groups_ahead(
    work: Workdir, tasks: Sequence[Task], source: Source, num_steps: int
) -> GroupsAhead:
    """`InFlight` if groups may be late, by the recipe, else `Rounds`."""
    config = work.config
    if isinstance(source, WorkerSource) and may_be_late(config):
        return InFlight(tasks, source.arrivals, config, num_steps, Ledger(work))
    return Rounds(tasks, source, config, num_steps)


class Rounds:
    """The groups of the next step, and of the `max_staleness` steps after it, by number."""

    def __init__(
        self,
        tasks: Sequence[Task],
        source: Source,
        config: ml_collections.ConfigDict,
        num_steps: int,
    ):
        self._tasks = TaskIterator(tasks, seed=config.seed, groups=config.batch.groups)
        self._source, self._config, self._num_steps = source, config, num_steps
        # Of each step ahead: where the tasks stood before it, and its groups.
        self._posted: collections.deque[tuple[dict, DueGroups]] = collections.deque()

    def draw(self, done: int) -> tuple[list[Rollout], dict[str, float]]:
        config = self._config
        last = min(done + config.max_staleness, self._num_steps - 1)
        for number in range(done + len(self._posted), last + 1):
            position, drawn = self._tasks.get_state(), next(self._tasks)
            first = number * groups_of_step(config)
            # Those that a resumed run posts at once are drawn as if it had posted them in time.
            version = max(number - config.max_staleness, 0)
            due = due_groups(config, [task.task_id for task in drawn], first, version)
            self._posted.append((position, due))
            self._source.post(due)
        groups = self._source.wait(self._posted[0][1])
        return [rollout for group in groups for rollout in group], {}

    def trained(self) -> None:
        self._posted.popleft()

    def get_state(self) -> dict[str, Any]:
        """Where the tasks stood before those of the next step."""
        return self._posted[0][0] if self._posted else self._tasks.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._tasks.set_state(state)


class InFlight:
    """A fixed number of groups in flight; each step takes the oldest of those that are whole.

    In flight are `max_staleness` + 1 steps' worth of groups, and `batch.oversample` more: when a
    step has taken its groups, as many new ones are posted. So no more is drawn than is trained on,
    and a quick group is not preferred to a slow one that is whole. A group is dropped if it holds a
    token that is more than `max_staleness` versions older than what the step trains, or if it is
    bound to, or after `batch.deadline_sec`; a new one takes its place. With `batch.stragglers` =
    'wait' a step waits for what would get too old.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        arrivals: Arrivals,
        config: ml_collections.ConfigDict,
        num_steps: int,
        ledger: 'Ledger',
    ):
        self._tasks = TaskIterator(tasks, seed=config.seed, groups=1)
        self._arrivals, self._config, self._num_steps = arrivals, config, num_steps
        self._ledger = ledger
        self._posted: list[DueGroups] = []
        self._is_told = True  # whether the workers know of what is posted
        self._next = 0  # the number of the next new group
        self._whole: dict[int, list[Rollout]] = {}
        self._chosen: list[int] = []
        self._dropped: list[int] = []  # for the next step

    def draw(self, done: int) -> tuple[list[Rollout], dict[str, float]]:
        if not self._is_told:
            for due in self._posted:
                self._arrivals.post(due)
            self._is_told = True
        self.post(done)
        row = distributed.leader_says(self._ledger.find(done + 1))
        if row is None:
            self._wait(done)
            oldest_first = sorted(self._whole, key=lambda i: (_oldest(self._whole[i], done), i))
            self._chosen = oldest_first[: self._config.batch.groups]
            self._ledger.write(done + 1, self._chosen, self._dropped)
        else:  # the run was killed in this step or after it, and does the same again
            self._chosen = row['groups']
            self._drop_again(row['dropped'], done)
            self._expect_posted(self._chosen, done)
            unread = [i for i in self._chosen if i not in self._whole]
            if unread:
                self._whole |= zip(unread, self._arrivals.wait_for(self._posted, unread))
        self._arrivals.read_ahead(self._posted, {*self._whole})
        values = {
            'rollout/in_flight_groups': float(len(self._in_flight()) - len(self._chosen)),
            'rollout/late_groups': float(len(self._dropped)),
            'rollout/waiting_groups': float(len(self._whole) - len(self._chosen)),
        }
        return [rollout for i in self._chosen for rollout in self._whole[i]], values

    def post(self, done: int) -> None:
        """Posts new groups until as many are in flight as may be."""
        config = self._config
        steps = min(config.max_staleness + 1, self._num_steps - done)
        wanted = steps * config.batch.groups + config.batch.oversample
        count = wanted - len(self._in_flight())
        if count > 0:
            ids = [task.task_id for _ in range(count) for task in next(self._tasks)]
            due = due_groups(config, ids, self._next, done)
            self._next += count
            self._posted.append(due)
            self._arrivals.post(due)

    def trained(self) -> None:
        self._remove(self._chosen)
        self._dropped = []

    def get_state(self) -> dict[str, Any]:
        return {
            'tasks': self._tasks.get_state(),
            'next': self._next,
            'posted': [dataclasses.asdict(due) for due in self._posted],
            'dropped': list(self._dropped),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._tasks.set_state(state['tasks'])
        self._next = state['next']
        self._posted = [DueGroups.of(each) for each in state['posted']]
        self._dropped = list(state.get('dropped', []))  # checkpoints of earlier code have none
        self._is_told = False

    def _wait(self, done: int) -> None:
        """Returns when enough groups are whole. Meanwhile it drops those that come too late."""
        oldest = done - self._config.max_staleness
        is_enough = must_wait = False  # at first, so that an older group that is whole goes first
        while not is_enough:
            arrived, late, begun = self._arrivals.look(self._posted, self._whole, oldest, must_wait)
            self._whole |= zip(arrived, self._arrivals.read('train', arrived))
            versions = {i: _oldest(group, done) for i, group in self._whole.items()}
            stale = [i for i, version in versions.items() if version < oldest]
            self._drop(sorted({*stale, *late}), done)
            is_enough, must_wait = len(self._whole) >= self._config.batch.groups, True
            if self._config.batch.stragglers == 'wait':
                whole = [versions[i] for i in self._whole]
                is_enough = is_enough and self._leaves_time(whole, begun.values(), done)

    def _leaves_time(self, whole: Collection[int], begun: Collection[int], done: int) -> bool:
        """Whether what is whole now holds all that this step has to take, so that no other group
        gets too old for the steps after it.

        whole, begun: the oldest version of each group that is whole, and that workers draw.
        """
        size = self._config.batch.groups
        for later in range(self._config.max_staleness + 1):
            # What is of these versions is trained on now or in the `later` steps after this one,
            # which can take so many of them.
            last = done - self._config.max_staleness + later
            ready = sum(version <= last for version in whole)
            unready = sum(version <= last for version in begun)
            if ready < min(ready + unready - size * later, size):
                return False
        return True

    def _drop(self, group_ids: Sequence[int], done: int) -> None:
        """Drops groups for good, and posts others in their place."""
        if group_ids:
            numbers = ', '.join(map(str, group_ids))
            report.CONSOLE.print(f'step {done + 1}: groups {numbers} came too late and are dropped')
            self._remove(group_ids)
            self._dropped += group_ids
            self.post(done)

    def _drop_again(self, group_ids: Sequence[int], done: int) -> None:
        """Drops what a step has dropped by the ledger, among it groups that it posted itself in the
        place of others.
        """
        while {*group_ids} - {*self._dropped}:
            left = [i for i in group_ids if i not in self._dropped]
            there = [i for i in left if i in self._in_flight()]
            self._expect_posted(there or left, done)
            self._drop(there, done)

    def _in_flight(self) -> set[int]:
        return {i for due in self._posted for i in due.group_ids}

    def _expect_posted(self, group_ids: Sequence[int], done: int) -> None:
        """Raises ValueError for groups that are not in flight: nobody would ever draw them."""
        if unknown := sorted({*group_ids} - self._in_flight()):
            raise ValueError(
                f'{LEDGER}: step {done + 1} took groups {unknown}, which are not in flight after '
                f'step {done}, so it does not belong to this checkpoint; remove its rows from step '
                f'{done + 1} on'
            )

    def _remove(self, group_ids: Sequence[int]) -> None:
        gone = set(group_ids)
        for group_id in gone:
            self._whole.pop(group_id, None)
        kept = [self._arrivals.remove(due, gone) for due in self._posted]
        self._posted = [due for due in kept if due.group_ids]


class Ledger:
    """groups.jsonl: which groups a step trains on, written before it does.

    A run that is killed and resumed at an earlier step finds here what the steps after that trained
    on, and trains on the same again: with the same weights as before, since all else is
    deterministic. Its rows say of every group in which step it was trained on or dropped, once.
    """

    def __init__(self, work: Workdir):
        self._file, self._rows = work.path / LEDGER, {}
        if not distributed.leads():
            return
        local = self._file.read_text() if self._file.exists() else ''
        if work.take(LEDGER):
            rows = whole_rows(self._file.read_text())
            # A bucket has those up to the last save, of whichever machine the run was on. This
            # machine's later ones count if the run was on no other one meanwhile.
            ours, last = whole_rows(local), max((row['step'] for row in rows), default=0)
            if [row for row in ours if row['step'] <= last] == rows:
                rows = ours
            write_whole(self._file, ''.join(json.dumps(row) + '\n' for row in rows))
            self._rows = {row['step']: row for row in rows}

    def find(self, step: int) -> dict[str, Any] | None:
        return self._rows.get(step)

    def write(self, step: int, groups: Sequence[int], dropped: Sequence[int]) -> None:
        if distributed.leads():
            row = {'step': step, 'groups': list(groups), 'dropped': list(dropped)}
            with self._file.open('a') as file:
                file.write(json.dumps(row) + '\n')


def due_groups(
    config: ml_collections.ConfigDict, task_ids: Sequence[str], first_group: int, version: int
) -> DueGroups:
    """Training groups of these tasks, from `first_group` on."""
    return DueGroups(
        store='train',
        split='train',
        first_group=first_group,
        task_ids=tuple(task_ids),
        group_size=config.group_size,
        temperature=config.policy.temperature,
        version=version,
    )


def _oldest(group: Sequence[Rollout], done: int) -> int:
    """The oldest version that sampled a token of the group; `done` if none was sampled."""
    versions = np.concatenate([rollout.action_versions for rollout in group])
    return int(versions.min()) if len(versions) else done
