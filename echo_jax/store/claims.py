"""Which worker draws which due group: a claim, on a lease that the worker renews.

    claims/train/000000000012    the worker that draws group 12 of the store `train`

A claim is written on condition that nobody else has written it meanwhile, so one worker has it. If
it has not been renewed for the time of its lease, another worker takes it over: a dead worker's
groups wait no longer than that. No clock is compared with another's: a worker measures by its own
how long it has seen a claim unchanged. A claim says how long its lease is, since workers may differ
in that. On an S3 service without conditional writes two workers may draw one group, of which the
rollout store keeps the first.
"""

import dataclasses
import pathlib
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable
from typing import Any

import tensorstore as ts

from echo_jax.store.kvstore import inside, intact, open_kvstore, seal

Group = tuple[str, int]  # the rollout store that it goes to, and its number


class NameTaken(RuntimeError):
    """Two workers of one run have one name, so each takes the other for its dead predecessor."""


@dataclasses.dataclass
class _Seen:
    """A claim as this worker saw it last."""

    generation: bytes
    since: float  # by time.monotonic(), when this generation was seen, or written, first
    version: int = -1  # of a claim of its own


class Claims:
    """The claims of one worker under `url`, the folder of `DueStore`.

    Calls block, and may come from several threads: a group is released while others are renewed.
    """

    def __init__(self, url: str | pathlib.Path, worker: str, lease_sec: float):
        self._kvstore = open_kvstore(url)
        self._worker, self._lease_sec = worker, lease_sec
        self._process = secrets.token_hex(8)
        self._held: dict[Group, _Seen] = {}
        self._others: dict[Group, _Seen] = {}
        self._lost: set[Group] = set()  # and not told yet
        self._renewals = 0
        self._lock = threading.Lock()  # of what is held, and of the writes to it

    @property
    def held(self) -> set[Group]:
        with self._lock:
            return set(self._held)

    def take(self, group: Group, version: int) -> bool:
        """Claims a group, unless another worker has a claim whose lease runs; True if it did.

        No token of the group will be of weights older than `version`.
        A claim that has this worker's name is of a process before it, which is dead. One that is
        damaged is nobody's.
        """
        found = self._kvstore.read(claim_key(group)).result()
        generation = found.stamp.generation
        for claim in _claims(group, found):
            lease_sec = claim.get('lease_sec', self._lease_sec)  # earlier code wrote none
            is_others = claim['worker'] != self._worker
            if is_others and not self._has_run_out(group, generation, lease_sec):
                return False
        with self._lock:
            return self._write(group, generation, version)

    def free(self, store: str, group_ids: Iterable[int]) -> list[int]:
        """Those of the groups that no worker has claimed, as far as one listing tells."""
        prefix = f'claims/{store}/'.encode()
        found = self._kvstore.list(inside(f'claims/{store}')).result()
        claimed = {key.removeprefix(prefix) for key in found}
        return [i for i in group_ids if b'%012d' % i not in claimed]

    def forget(self, groups: Collection[Group]) -> None:
        """Forgets what it has seen of others' claims, but for those of `groups`."""
        self._others = {group: seen for group, seen in self._others.items() if group in groups}

    def renew(self) -> set[Group]:
        """Renews what is due for it, a third of a lease old; returns the groups that are lost.

        A group is lost if its lease ran out and another worker took it, or if the learner wants it
        no longer. Raises NameTaken if a worker of the same name took it. If the store fails in
        between, what was lost by then is returned the next time.
        """
        for group in self.held:
            if not self._renew(group):
                self._lost.add(group)
        lost, self._lost = self._lost, set()
        return lost

    def release(self, group: Group) -> None:
        """Gives up a claim, if this worker still has it."""
        with self._lock:
            seen = self._held.pop(group, None)
            if seen is not None:
                self._kvstore.write(claim_key(group), None, if_equal=seen.generation).result()

    def _has_run_out(self, group: Group, generation: bytes, lease_sec: float) -> bool:
        now, seen = time.monotonic(), self._others.get(group)
        if seen is None or seen.generation != generation:
            self._others[group] = _Seen(generation, now)
            return False
        return now - seen.since > lease_sec

    def _renew(self, group: Group) -> bool:
        """False if the group is lost; one that was released meanwhile is not."""
        with self._lock:
            seen = self._held.get(group)
            if seen is None or time.monotonic() - seen.since <= self._lease_sec / 3:
                return True
            return self._write(group, seen.generation, seen.version)

    def _write(self, group: Group, over: bytes, version: int) -> bool:
        """Writes this worker's claim over what has the generation `over`; False if that changed."""
        self._renewals += 1  # so that every write has other bytes, and another generation
        claim = {'worker': self._worker, 'process': self._process, 'version': version}
        value = seal(claim | {'renewals': self._renewals, 'lease_sec': self._lease_sec})
        stamp = self._kvstore.write(claim_key(group), value, if_equal=over).result()
        if not stamp.generation:  # the condition failed
            if self._held.pop(group, None):
                self._expect_no_namesake(group)
            return False
        self._others.pop(group, None)
        self._held[group] = _Seen(stamp.generation, time.monotonic(), version)
        return True

    def _expect_no_namesake(self, group: Group) -> None:
        """Of a group that this worker has lost."""
        for claim in _claims(group, self._kvstore.read(claim_key(group)).result()):
            if claim['worker'] == self._worker and claim.get('process') != self._process:
                raise NameTaken(
                    f'another worker named {self._worker} draws for this run and has taken over '
                    'what this one drew; start each with a --name of its own'
                )


def read_claims(url: str | pathlib.Path, store: str) -> dict[int, dict[str, Any]]:
    """{number of a group: {'worker': its name, 'version': the oldest weights of its tokens, ...}}.

    Of the groups of `store` that are claimed, whether or not the worker still lives; without claims
    that are damaged.
    """
    kvstore = open_kvstore(url)
    found = kvstore.list(inside(f'claims/{store}')).result()
    keys = [key for key in found if re.fullmatch(rb'.*/\d{12}', key)]  # no lock files
    reads = [((store, int(key[-12:])), kvstore.read(key)) for key in keys]
    return {group[1]: claim for group, read in reads for claim in _claims(group, read.result())}


def _claims(group: Group, found: ts.KvStore.ReadResult) -> list[dict[str, Any]]:
    """The claim that was read, or nothing if there is none, or if it is damaged."""
    return intact([(claim_key(group), found.value)] if found.state == 'value' else [])


def claim_key(group: Group) -> str:
    store, group_id = group
    return f'claims/{store}/{group_id:012d}'
