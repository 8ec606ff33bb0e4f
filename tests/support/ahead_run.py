"""A learner without its learning: it draws the steps of a run on real stores."""

import ml_collections

from configs import base
from echo_jax.run.ahead import InFlight, Ledger
from echo_jax.run.arrivals import Arrivals
from echo_jax.run.entry import Stop
from echo_jax.run.workdir import Workdir
from echo_jax.store.due import DueStore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Task
from tests.support.groups import small_group

TASKS = [Task(f'task-{i}', None, '') for i in range(200)]


def recipe(groups=2, staleness=2, **batch) -> ml_collections.FrozenConfigDict:
    c = base.get_config()
    c.policy.backend = 'vllm'
    c.max_staleness = staleness
    c.batch.groups, c.group_size = groups, 2
    c.batch.update(batch)
    return ml_collections.FrozenConfigDict(c)


class Run:
    """Draws steps; the version of the weights is the number of steps."""

    def __init__(self, folder, config, steps=12, check_published=lambda: None):
        self.work = Workdir(folder, config)
        self.store = RolloutStore(self.work.url('rollouts', 'train'))
        self.due = DueStore(self.work.url('fleet'))
        self.steps, self.done, self.check_published = steps, 0, check_published
        self.start()

    def start(self, state=None, done=0):
        """A process that starts; `state` is of the checkpoint at `done`."""
        ledger, config, self.stop = Ledger(self.work), self.work.config, Stop()
        self.arrivals = Arrivals(self.work, self.stop, lambda: None, self.check_published)
        self.ahead = InFlight(TASKS, self.arrivals, config, self.steps, ledger)
        self.done = done
        self.due.clear()
        if state:
            self.ahead.set_state(state)

    def step(self) -> tuple[list[int], dict[str, float]]:
        rollouts, values = self.ahead.draw(self.done)
        oldest = min(r.policy_versions.max() for r in rollouts)
        assert 0 <= self.done - oldest <= self.work.config.max_staleness
        self.ahead.trained()
        self.done += 1
        return sorted({r.group_id for r in rollouts}), values

    def wanted(self) -> list[int]:
        """The groups that workers have to draw, by number."""
        ids = sorted(i for due in self.due.listed() for i in due.group_ids)
        return self.store.missing(ids)

    def write(self, *group_ids: int, version: int | None = None) -> None:
        tasks = dict(pair for due in self.due.listed() for pair in due.assignments)
        for i in (i for i in group_ids if i in tasks):  # others are due no longer
            version = self.done if version is None else version
            self.store.write_group(small_group(i, tasks[i], version))


def begun(run: Run) -> None:
    """Lets the run post what its first step wants, which the test then draws."""
    run.ahead.post(run.done)
