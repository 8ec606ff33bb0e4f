"""What the learner posts for its workers, and what has arrived of it.

Of a learner with several processes each has one, and all make the same calls: process 0 alone looks
into the stores, and what it saw is told to the others, because a process that left a wait alone
would hang them.
"""

import dataclasses
import time
from collections.abc import Collection, Container, Sequence, Set

from echo_jax.learner import distributed
from echo_jax.run import report
from echo_jax.run.entry import Stop, Stopped
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import read_claims
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout

_SILENCE_SECONDS = 60.0  # without a new group, before a person is told


class Arrivals:
    """Groups that workers draw, from the moment in which they are posted."""

    def __init__(self, work: Workdir, stop: Stop):
        self.due = DueStore(work.url('fleet'))
        self._work, self._stop = work, stop
        self._claimed: dict[int, float] = {}  # when a claim was seen first, by time.monotonic()

    def post(self, due: DueGroups) -> None:
        if distributed.leads():
            self.due.post(due)

    def remove(self, due: DueGroups, group_ids: Collection[int]) -> DueGroups:
        """`due` without these groups, which no worker has to draw any more."""
        if distributed.leads():
            return self.due.remove(due, group_ids)
        gone = tuple(i for i in due.group_ids if i in group_ids)
        return dataclasses.replace(due, without=(*due.without, *gone))

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        """All of these groups, by number, and withdraws them. Raises Stopped on a stop."""
        wanted, arrived = set(due.group_ids), set()
        while arrived < wanted:
            arrived |= {*self.look([due], arrived)[0]}
        if distributed.leads():
            self.due.withdraw(due)
        return self.read(due.store, due.group_ids)

    def look(
        self,
        posted: Sequence[DueGroups],
        known: Container[int],
        oldest: int | None = None,
        must_wait: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Of the groups that are `posted` and not `known`: those that have arrived, and the late.

        A group is late if it has not arrived, and a worker began it with weights older than
        `oldest`, or more than `batch.deadline_sec` ago; without `oldest` none is. If `must_wait`,
        it waits until there are groups to return. Raises Stopped if a stop is requested.
        """
        seen = self._look(posted, known, oldest, must_wait) if distributed.leads() else None
        seen = distributed.leader_says(seen)
        if seen is None:
            raise Stopped
        arrived, late = seen
        return arrived, late

    def read(self, store: str, group_ids: Sequence[int]) -> list[list[Rollout]]:
        return RolloutStore(self._work.url('rollouts', store)).read_groups(group_ids)

    def _look(
        self,
        posted: Sequence[DueGroups],
        known: Container[int],
        oldest: int | None,
        must_wait: bool,
    ) -> tuple[list[int], list[int]] | None:
        """The same in the leading process; None on a stop."""
        wanted = {due: [i for i in due.group_ids if i not in known] for due in posted}
        since = time.monotonic()
        while not self._stop.requested:
            arrived, missing = [], set()
            for due, group_ids in wanted.items():
                store = RolloutStore(self._work.url('rollouts', due.store))
                lacking = {*store.missing(group_ids)}
                arrived += [i for i in group_ids if i not in lacking]
                missing |= lacking
            late = [] if oldest is None else self._late(missing, oldest)
            if arrived or late or not must_wait:
                return arrived, late
            if time.monotonic() - since > _SILENCE_SECONDS:
                report.CONSOLE.print(self._silence(posted, len(missing)))
                since = time.monotonic()
            time.sleep(self._work.poll_seconds)
        return None

    def _late(self, missing: Set[int], oldest: int) -> list[int]:
        """Those of the missing groups of training that were claimed too long ago."""
        now, limit = time.monotonic(), self._work.config.batch.deadline_sec
        claims = read_claims(self.due.url, 'train')
        claims = {number: claim for number, claim in claims.items() if number in missing}
        self._claimed = {number: self._claimed.get(number, now) for number in claims}
        return sorted(
            number
            for number, claim in claims.items()
            if claim['version'] < oldest or (limit and now - self._claimed[number] > limit)
        )

    def _silence(self, posted: Sequence[DueGroups], missing: int) -> str:
        """What a person wants to know if no group comes."""
        now = time.time()
        workers = '; '.join(
            f'{document["worker"]} with version {document["version"]} draws '
            f'{document["drawing"]} groups and reported {now - document["at"]:.0f} s ago'
            for document in self.due.reports()
        )
        advice = (
            f'workers: {workers}'
            if workers
            else 'no worker has reported: start python -m echo_jax.worker with the same --config '
            'and --workdir'
        )
        return (
            f'{missing} groups of {posted[0].store} at version {posted[-1].version} are missing, '
            f'none new for {_SILENCE_SECONDS:.0f} s; {advice}'
        )
