"""In which step a group is trained on. No JAX, for those that only look at a run."""

import ml_collections
import tensorstore as ts

from echo_jax.run.workdir import whole_rows

STRAGGLERS = ('drop', 'wait')
LEDGER = 'groups.jsonl'  # of runs whose groups may be late; see ahead.py


def may_be_late(config: ml_collections.ConfigDict) -> bool:
    """Whether a step takes the groups that are whole, and does not wait for those of its number."""
    late = config.max_staleness or config.batch.oversample or config.batch.deadline_sec
    return config.policy.backend == 'vllm' and bool(late)


def groups_of_step(config: ml_collections.ConfigDict) -> int:
    """How many numbers of groups a step has: its tasks, and those that it may draw anew.

    Of runs whose groups are not late.
    """
    redraws = config.loss.redraw_limit if config.loss.equal_groups == 'redraw' else 0
    return config.batch.groups + redraws


class Steps:
    """The step, from 1, that trains on a group of the store `train`."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config
        # (step, whether it trained on the group or dropped it) by group.
        self._ledger: dict[int, tuple[int, bool]] | None = {} if may_be_late(config) else None

    def read(self, kvstore: ts.KvStore) -> None:
        """Reads what the learner has written by now in the run's folder."""
        if self._ledger is not None:
            rows = whole_rows(kvstore.read(LEDGER).result().value.decode())
            self._ledger = {i: (row['step'], True) for row in rows for i in row['groups']}
            self._ledger |= {i: (row['step'], False) for row in rows for i in row['dropped']}

    def is_known(self, group_id: int) -> bool:
        """Whether it is decided which step that is, or that none is."""
        return self._ledger is None or group_id in self._ledger

    def __getitem__(self, group_id: int) -> int | None:
        """None if the group was dropped, or no step has taken it yet."""
        if self._ledger is None:
            return self.decided(group_id)
        step, is_trained = self._ledger.get(group_id, (None, False))
        return step if is_trained else None

    def decided(self, group_id: int) -> int | None:
        """The step that trains on the group or dropped it; None if no step has done so yet."""
        if self._ledger is None:
            return group_id // groups_of_step(self._config) + 1
        return self._ledger.get(group_id, (None, False))[0]
