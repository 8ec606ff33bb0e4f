"""Tells the workers which groups are due, and tells the learner how its workers are.

    due/train/000000000012       groups that are drawn alike: numbers from 12 on, with their tasks
    workers/NAME                 the last report of a worker
    finished                     exists when nothing will be due any more

It draws no groups and gives none to anybody: workers claim them (claims.py). A group is done when
the rollout store has it. Every document has a checksum and is written whole: a reader sees an old
one or a new one. A damaged one is as good as absent: who wrote it writes it again.
"""

import dataclasses
import pathlib
import time
from collections.abc import Collection, Mapping
from typing import Any

import tensorstore as ts

from echo_jax.store.claims import claim_key
from echo_jax.store.kvstore import inside, intact, open_kvstore, seal


@dataclasses.dataclass(frozen=True)
class DueGroups:
    """Groups that are drawn alike: those of one step, or of one evaluation."""

    store: str  # name of the rollout store that they go to
    split: str  # 'train' or 'heldout': whose tasks
    first_group: int
    task_ids: tuple[str, ...]  # of group first_group + i
    group_size: int
    temperature: float
    version: int  # the oldest weights that may sample them
    without: tuple[int, ...] = ()  # numbers of those that are due no longer

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> 'DueGroups':
        """What `dataclasses.asdict` made JSON of, which knows lists alone."""
        fields = dict(document)
        for name in ('task_ids', 'without'):
            fields[name] = tuple(fields.get(name, ()))
        return cls(**fields)

    @property
    def assignments(self) -> list[tuple[int, str]]:
        """(number, task's id) of each group."""
        numbered = enumerate(self.task_ids, self.first_group)
        return [(number, task_id) for number, task_id in numbered if number not in self.without]

    @property
    def group_ids(self) -> list[int]:
        return [number for number, _ in self.assignments]


class DueStore:
    """Under `url`: a path, or a `file://`, `gs://`, `s3://` or `memory://` URL. Calls block."""

    def __init__(self, url: str | pathlib.Path):
        self.url = str(url)
        self._kvstore = open_kvstore(url)

    def post(self, due: DueGroups) -> None:
        """Makes these groups due; posting them again changes nothing."""
        self._kvstore[_key(due)] = seal(dataclasses.asdict(due))

    def listed(self) -> list[DueGroups]:
        """What was posted and not withdrawn, by store and number."""
        return [DueGroups.of(each) for each in self._read('due')]

    def withdraw(self, due: DueGroups) -> None:
        """Makes these groups due no longer, whether or not they have been drawn or claimed."""
        self._kvstore.write(_key(due), None).result()
        self._unclaim(due.store, due.first_group, due.first_group + len(due.task_ids))

    def remove(self, due: DueGroups, group_ids: Collection[int]) -> DueGroups:
        """Makes some of these groups due no longer; returns what is left."""
        gone = [i for i in due.group_ids if i in group_ids]
        if not gone:
            return due
        left = dataclasses.replace(due, without=(*due.without, *gone))
        if left.group_ids:
            self.post(left)
            for group_id in gone:
                self._unclaim(due.store, group_id, group_id + 1)
        else:
            self.withdraw(due)
        return left

    def _unclaim(self, store: str, first: int, end: int) -> None:
        keys = ts.KvStore.KeyRange(claim_key((store, first)), claim_key((store, end)))
        self._kvstore.delete_range(keys).result()

    def clear(self) -> None:
        """Withdraws everything: for a learner that starts, before it posts groups of its own.

        Workers are told no longer to end, if the run had finished: it may be longer now.
        """
        self._kvstore.delete_range(inside('due')).result()
        self._kvstore.write('finished', None).result()

    def finish(self) -> None:
        """Tells every worker to end."""
        self._kvstore['finished'] = seal({'at': time.time()})

    def finished(self) -> bool:
        return self._kvstore.read('finished').result().state == 'value'

    def report(self, worker: str, values: dict) -> None:
        """Replaces the last report of `worker` by `values`, with its name and the time."""
        document = {'worker': worker, 'at': time.time()} | values
        self._kvstore[f'workers/{worker}'] = seal(document)

    def reports(self, since: float = 0.0) -> list[dict]:
        """The last report of each worker, unless it is older than `since`.

        `at` is in seconds since 1970, by that worker's clock.
        """
        return [each for each in self._read('workers') if each['at'] >= since]

    def _read(self, folder: str) -> list[dict]:
        keys = sorted(self._kvstore.list(inside(folder)).result())
        keys = [key for key in keys if not key.endswith(b'.__lock')]  # see kvstore.py
        found = [future.result() for future in [self._kvstore.read(key) for key in keys]]
        documents = ((f'{self.url}/{key.decode()}', each) for key, each in zip(keys, found))
        return intact((name, each.value) for name, each in documents if each.state == 'value')


def _key(due: DueGroups) -> str:
    return f'due/{due.store}/{due.first_group:012d}'
