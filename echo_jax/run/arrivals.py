"""What the learner posts for its workers, and what has arrived of it.

Of a learner with several processes each has one, and all make the same calls: process 0 alone looks
into the stores, and what it saw is told to the others, because a process that left a wait alone
would hang them.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Collection, Container, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np

from echo_jax.learner import distributed
from echo_jax.run import report
from echo_jax.run.entry import Stop, Stopped
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Group, read_claims
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.kvstore import MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import UNREADABLE, WeightStore
from echo_jax.types import Rollout

_SILENCE_SECONDS = 60.0  # without a new group, before a person is told
REPORTS_SECONDS = 2.0  # between two looks at what workers report
# What a look meets in vain, and the next meets again: MissingError if the leader sets a group aside
# between the moments in which another process lists it and reads it.
_AGAIN = (OSError, ValueError, MissingError)


class Seen(NamedTuple):
    """What a look has found of groups, by number."""

    arrived: list[int]
    late: list[int]
    begun: dict[int, int]  # those that workers draw, and the oldest version of their tokens


class Arrivals:
    """Groups that workers draw, from the moment in which they are posted.

    A group that is damaged has not arrived: it is set aside, and workers draw it anew.
    """

    def __init__(
        self,
        work: Workdir,
        stop: Stop,
        publish_again: Callable[[], None],
        check_published: Callable[[], None],
    ):
        """publish_again: every process calls it if the newest weights are damaged.
        check_published: raises if the weights that workers wait for could not be written.
        """
        self.due = DueStore(work.url('fleet'))
        self._work, self._stop = work, stop
        self.publish_again, self._check_published = publish_again, check_published
        self._weights = WeightStore(work.url('weights'))
        # When a worker's claim of a group was seen first, by time.monotonic().
        self._claimed: dict[tuple[int, str], float] = {}
        self._groups: dict[Group, list[Rollout]] = {}  # read, and not asked for yet
        self._lock = threading.Lock()  # of that
        self._ahead: dict[str, list[int]] = {}  # what is read ahead, by store
        self._reader: threading.Thread | None = None
        self._closed = threading.Event()
        self._sound: set[str] = set()  # attempts at weights that were read here, and are right

    def post(self, due: DueGroups) -> None:
        if distributed.leads():
            self.due.post(due)

    def remove(self, due: DueGroups, group_ids: Collection[int]) -> DueGroups:
        """`due` without these groups, which no worker has to draw any more."""
        for group_id in group_ids:
            self._groups.pop((due.store, group_id), None)
        if distributed.leads():
            return self.due.remove(due, group_ids)
        gone = tuple(i for i in due.group_ids if i in group_ids)
        return dataclasses.replace(due, without=(*due.without, *gone))

    def wait(self, due: DueGroups, newest: int) -> list[list[Rollout]]:
        """All of these groups, by number, and withdraws them. Raises Stopped on a stop.

        newest: of the versions that this learner has published. A worker may still draw for a
        learner that was killed, while the weights go back to those of its last save. What comes of
        it, a group with tokens of older weights than it is due at, or of newer ones than `newest`,
        is drawn anew.
        """
        groups = self.wait_for([due], due.group_ids)
        while wrong := [g[0].group_id for g in groups if not _is_of(g, due.version, newest)]:
            report.CONSOLE.print(
                f'groups {", ".join(map(str, wrong))} of {due.store} were sampled for a learner '
                f'before this one, by other weights than versions {due.version} to {newest}; they '
                'are drawn anew',
                soft_wrap=True,
            )
            if distributed.leads():
                RolloutStore(self._work.url('rollouts', due.store)).remove(wrong)
            groups = self.wait_for([due], due.group_ids)
        if distributed.leads():
            self.due.withdraw(due)
        return groups

    def wait_for(
        self, posted: Sequence[DueGroups], group_ids: Sequence[int]
    ) -> list[list[Rollout]]:
        """These of the groups that are posted. Raises Stopped on a stop."""
        wanted, arrived = set(group_ids), set()
        others = {i for due in posted for i in due.group_ids} - wanted
        while not wanted <= arrived:
            arrived |= {*self.look(posted, arrived | others).arrived}
        return self.read(posted[0].store, group_ids)

    def look(
        self,
        posted: Sequence[DueGroups],
        known: Container[int],
        oldest: int | None = None,
        must_wait: bool = True,
    ) -> Seen:
        """What has become of the groups that are `posted` and not `known`.

        A group is late if it has not arrived, and a worker began it with weights older than
        `oldest`, or more than `batch.deadline_sec` ago; without `oldest` none is late, nor `begun`.
        If `must_wait`, it waits until some have arrived or are late. Raises Stopped if a stop is
        requested.
        """
        while True:
            seen = self._look(posted, known, oldest, must_wait) if distributed.leads() else None
            seen = distributed.leader_says(seen)
            if seen is None:
                raise Stopped
            arrived, late, begun, is_damaged = seen
            if not is_damaged:
                return Seen(arrived, late, dict(begun))
            report.CONSOLE.print('the newest weights are damaged; they go out again')
            self.publish_again()

    def read(self, store: str, group_ids: Sequence[int]) -> list[list[Rollout]]:
        """Groups that have arrived, once each."""
        with self._lock:
            unread = [i for i in group_ids if (store, i) not in self._groups]
            groups = RolloutStore(self._work.url('rollouts', store)).read_groups(unread)
            self._groups |= {(store, i): group for i, group in zip(unread, groups)}
            return [self._groups.pop((store, i)) for i in group_ids]

    @property
    def held(self) -> set[Group]:
        """The groups that are read and that nobody has asked for yet."""
        return set(self._groups)

    def read_ahead(self, posted: Sequence[DueGroups], known: Container[int]) -> None:
        """From now on a thread reads what arrives of these groups, while the learner learns."""
        ahead: dict[str, list[int]] = {}
        for due in posted:
            ahead.setdefault(due.store, []).extend(i for i in due.group_ids if i not in known)
        with self._lock:
            self._ahead = ahead
            gone = [(s, i) for s, i in self._groups if s in ahead and i not in ahead[s]]
            for group in gone:
                del self._groups[group]
        if self._reader is None:
            self._reader = threading.Thread(target=self._read, name='read')
            self._reader.start()

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        if self._reader is not None:
            self._reader.join()

    def _read(self) -> None:
        # Python ends when this thread has, and this one when the program's last line was.
        while not self._closed.wait(self._work.poll_seconds) and threading.main_thread().is_alive():
            with self._lock, contextlib.suppress(*_AGAIN):
                for store, group_ids in self._ahead.items():
                    self._take(store, group_ids)

    def _take(self, store: str, group_ids: Sequence[int]) -> list[int]:
        """Reads those that have arrived; returns the others."""
        rollouts = RolloutStore(self._work.url('rollouts', store))
        unread = [i for i in group_ids if (store, i) not in self._groups]
        missing = {*rollouts.missing(unread)}
        there = [i for i in unread if i not in missing]
        if distributed.leads():
            sound = rollouts.read_sound(there)
        else:  # it is for the leader to set one aside
            sound = dict(zip(there, rollouts.read_groups(there)))
        self._groups |= {(store, i): group for i, group in sound.items()}
        return [i for i in group_ids if (store, i) not in self._groups]

    def _look(
        self,
        posted: Sequence[DueGroups],
        known: Container[int],
        oldest: int | None,
        must_wait: bool,
    ) -> tuple[list[int], list[int], list[tuple[int, int]], bool] | None:
        """The same in the leading process, as JSON can hold it, and whether the newest weights are
        damaged; None on a stop.
        """
        wanted = [(due.store, [i for i in due.group_ids if i not in known]) for due in posted]
        told = asked = time.monotonic()
        while not self._stop.requested:
            self._check_published()
            # Before the groups: a group whose claim is given up between the two has arrived.
            claims = {} if oldest is None else read_claims(self.due.url, 'train')
            arrived, missing = [], set()
            for store, group_ids in wanted:
                with self._lock:
                    lacking = {*self._take(store, group_ids)}
                arrived += [i for i in group_ids if i not in lacking]
                missing |= lacking
            late, begun = ([], {}) if oldest is None else self._begun(claims, missing, oldest)
            if arrived or late or not must_wait:
                return arrived, late, [*begun.items()], False
            now = time.monotonic()
            if now - asked > REPORTS_SECONDS:
                if self._is_damaged():
                    return [], [], [], True
                self._post_again(posted)
                asked = now
            if now - told > _SILENCE_SECONDS:
                report.CONSOLE.print(self._silence(posted, len(missing)))
                told = now
            time.sleep(self._work.poll_seconds)
        return None

    def _is_damaged(self) -> bool:
        """Whether the newest weights are damaged. They are read here if a worker says so: if they
        are sound, the fault is that worker's, and no other shall have to read them again.
        """
        newest = self._weights.newest()
        if newest is None or newest[1] in self._sound:
            return False
        version, attempt = newest
        named = [each['worker'] for each in self.due.reports() if each.get('damaged') == attempt]
        if not named and attempt != UNREADABLE:
            return False
        if not self._weights.is_sound(version):
            return True
        self._sound.add(attempt)
        report.CONSOLE.print(
            f'{", ".join(named)} cannot read version {version} of the weights, but it is sound: '
            'look at the network and the disk of that machine',
            soft_wrap=True,
        )
        return False

    def _post_again(self, posted: Sequence[DueGroups]) -> None:
        """Posts what workers cannot see although it is due, since its document is damaged."""
        visible = set(self.due.listed())
        for due in posted:
            if due not in visible:
                report.CONSOLE.print(
                    f'groups {due.first_group} and on of {due.store}: what was posted is damaged '
                    'or gone; it is posted again',
                    soft_wrap=True,
                )
                self.due.post(due)

    def _begun(
        self, claims: Mapping[int, Mapping[str, Any]], missing: Set[int], oldest: int
    ) -> tuple[list[int], dict[int, int]]:
        """Of the missing groups of training: those that were claimed too long ago, and the version
        of each of the others that are claimed.
        """
        now, limit = time.monotonic(), self._work.config.batch.deadline_sec
        claims = {number: claim for number, claim in claims.items() if number in missing}
        # A worker that takes over a dead one's group has all of the time for it.
        drawers = {number: (number, claim.get('process', '')) for number, claim in claims.items()}
        self._claimed = {drawer: self._claimed.get(drawer, now) for drawer in drawers.values()}
        late = {
            number
            for number, claim in claims.items()
            if claim['version'] < oldest or (limit and now - self._claimed[drawers[number]] > limit)
        }
        begun = {number: claim['version'] for number, claim in claims.items() if number not in late}
        return sorted(late), begun

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


def _is_of(group: Sequence[Rollout], oldest: int, newest: int) -> bool:
    """Whether versions `oldest` to `newest` have sampled all of the group."""
    versions = np.concatenate([rollout.action_versions for rollout in group])
    return bool(((oldest <= versions) & (versions <= newest)).all())
