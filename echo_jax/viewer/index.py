"""The table of a run's rollouts, in memory, made by a thread that reads their stores.

Newest groups of training come first, then the other stores. Only what a row shows is kept; who
wants the tokens reads the group again.
"""

import concurrent.futures
import contextlib
import re
import threading
import time
from collections.abc import Generator

import numpy as np

from echo_jax.run.numbering import Steps
from echo_jax.run.workdir import Workdir
from echo_jax.store.kvstore import MissingError, inside, open_kvstore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.scores import ScoreStore
from echo_jax.types import Role, Rollout, TokenScores
from echo_jax.viewer.logs import Table
from echo_jax.viewer.text import number, visible

Group = tuple[str, int]  # name of its store, number
_RUN = ('', 0)  # what stands for the whole run among the problems
_GROUP = re.compile(rb'rollouts/([\w.-]+)/groups/(\d{12})')
_AT_ONCE = 256  # groups that are read before the stores are listed again
_READERS = 4


class Index:
    """Rows of all rollouts, and the surprise of those whose scores are kept."""

    def __init__(self, work: Workdir):
        self._work = work
        self._kvstore = open_kvstore(work.url())
        self.scores = ScoreStore(work.url('scores', 'train'))
        self.rows = Table(
            *('store', 'task', 'step', 'group', 'sample', 'reward', 'status', 'reason'),
            *('turns', 'tokens', 'stop'),
        )
        # Apart from the rows, because scores come later than rollouts, and not for all of them.
        self.surprises = Table('row', 'surprise')
        self.steps = Steps(work.config)
        self.problems: dict[Group, str] = {}  # one line on each group that cannot be read
        self.found = 0  # groups that the last look has found
        self.read = 0  # groups whose rows are there
        self._first_row: dict[Group, int] = {}
        self._scored: set[Group] = set()
        self._stores: dict[str, RolloutStore] = {}
        self._closed = threading.Event()

    def store(self, name: str) -> RolloutStore:
        """The rollout store of that name; MissingError unless the run has one."""
        if name not in self._stores:
            raise MissingError(f'{self._work.url()} has no rollout store {visible(name)}')
        return self._stores[name]

    @contextlib.contextmanager
    def following(self) -> Generator[None]:
        """Reads in a thread, and goes on for as long as the block runs."""
        # A daemon thread that is inside TensorStore as Python ends would abort the process.
        thread = threading.Thread(target=self._follow, name='index')
        thread.start()
        try:
            yield
        finally:
            self._closed.set()
            thread.join()

    def _follow(self) -> None:
        pause = 20 * self._work.poll_seconds  # 2 s in a folder, 20 s in a bucket
        while not self._closed.is_set():
            started = time.monotonic()
            try:
                more = self.look()
                self.problems.pop(_RUN, None)
            except (OSError, ValueError) as error:  # the network, or credentials that have expired
                self.problems[_RUN], more = visible(str(error)), False
            if not more:  # listing a long run may take a twentieth of the time
                self._closed.wait(max(pause, 20 * (time.monotonic() - started)))

    def look(self) -> bool:
        """Lists the stores and reads a part of what is new; whether there is more to read."""
        there = self._list()
        self.found = len(there)
        for gone in self.problems.keys() - {*there, _RUN}:
            self.problems.pop(gone)
        new = [group for group in there if group not in self._first_row]
        # A damaged group is tried again at each look, after the others, until the run has drawn it
        # anew. It is no reason to look again at once.
        new.sort(key=lambda group: group in self.problems)
        kept = {('train', group_id) for group_id in self.scores.groups()}
        late = sorted((kept - self._scored) & self._first_row.keys(), reverse=True)
        wanted = new[:_AT_ONCE] + late[:_AT_ONCE]
        with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
            # What comes back is small: of the groups themselves, one a reader is in memory.
            loaded = readers.map(lambda group: self._load(group, group in kept), wanted)
            for group, (rows, surprises) in zip(wanted, loaded):
                self._add(group, rows, surprises)
                if self._closed.is_set():
                    readers.shutdown(cancel_futures=True)
                    return False
        return any(group not in self.problems for group in new[_AT_ONCE:] + late[_AT_ONCE:])

    def _list(self) -> list[Group]:
        """All groups that are there, in the order to read them; those of training when a step has
        taken or dropped them.
        """
        self.steps.read(self._kvstore)
        keys = self._kvstore.list(inside('rollouts')).result()
        matches = [match for match in map(_GROUP.fullmatch, keys) if match]
        groups = [(match[1].decode(), int(match[2])) for match in matches]
        for name in {name for name, _ in groups} - self._stores.keys():
            self._stores[name] = RolloutStore(self._work.url('rollouts', name))
        groups = [each for each in groups if each[0] != 'train' or self.steps.is_known(each[1])]
        return sorted(groups, key=lambda group: (group[0] != 'train', group[0], -group[1]))

    def _load(
        self, group: Group, with_scores: bool
    ) -> tuple[list[tuple], list[float | None] | None]:
        """(rows, their surprises): no rows, or None, of what cannot be read, which is noted."""
        name, group_id = group
        rows, surprises = [], None
        try:
            [rollouts] = self._stores[name].read_groups([group_id])
            rows = [self._row(name, rollout) for rollout in rollouts]
            scores = self.scores.read_group(group_id) if with_scores else None
            if scores is not None:
                surprises = [_surprise(r, scores.get(r.sample_id)) for r in rollouts]
            self.problems.pop(group, None)
        except (MissingError, ValueError) as error:
            self.problems[group] = visible(str(error))
        return rows, surprises

    def _row(self, store: str, rollout: Rollout) -> tuple:
        step = self.steps[rollout.group_id] if store == 'train' else None
        return (
            *(store, visible(rollout.task_id), step, rollout.group_id, rollout.sample_id),
            *(number(rollout.reward), rollout.status.value, visible(rollout.reason)),
            *(len(rollout.turn_starts), len(rollout.tokens), stop_reason(rollout)),
        )

    def _add(self, group: Group, rows: list[tuple], surprises: list[float | None] | None) -> None:
        if rows and group not in self._first_row:
            self._first_row[group] = len(self.rows)
            for row in rows:
                self.rows.append(*row)
            self.read += 1
        if surprises is not None:
            self._scored.add(group)
            for row, surprise in enumerate(surprises, self._first_row[group]):
                if surprise is not None:
                    self.surprises.append(row, surprise)


def _surprise(rollout: Rollout, scores: TokenScores | None) -> float | None:
    """The mean environment CE of its OUTPUT tokens, nats; None without them or their scores."""
    output = rollout.roles == Role.OUTPUT
    if scores is None or len(scores.logprobs_t1) != len(output) or not output.any():
        return None
    return number(-scores.logprobs_t1[output].astype(np.float64).mean(), 4)


def stop_reason(rollout: Rollout) -> str:
    """What ended the episode, 'done' or the budget that ran out; '' if it has not said so."""
    endings = [
        name for name, value in rollout.metrics.items() if name.startswith('stop/') and value
    ]
    return visible(endings[0].removeprefix('stop/')) if endings else ''
