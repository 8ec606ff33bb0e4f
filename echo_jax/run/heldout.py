"""The held-out tasks of a run: all of them before and after training, some of them in between.

Nothing that is drawn here is trained on.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from echo_jax.run import report
from echo_jax.run.intervals import Estimate
from echo_jax.run.measures import env_ce, imagined
from echo_jax.run.numbering import may_be_late
from echo_jax.run.results import pass_rates, result_of
from echo_jax.run.sources import Source
from echo_jax.store.due import DueGroups
from echo_jax.types import Batch, Rollout, Task


class Heldout:
    """Draws rollouts of the held-out tasks by the weights of some versions, and measures them.

    Every host of a learner has one, and all make the same calls.
    """

    def __init__(
        self,
        source: Source,
        tasks: Sequence[Task],
        config: ml_collections.ConfigDict,
        num_steps: int,
        score: Callable[[Any, Batch], Any],
    ):
        """score: (parameters, batch) -> log-probabilities [R, T], of `ShardedModel.score`."""
        self._source, self._tasks, self._config = source, list(tasks), config
        self._num_steps, self._score = num_steps, score
        self._fixed: list[Rollout] = []  # drawn before training: the environment CE's
        self._posted: DueGroups | None = None  # not waited for yet
        self._is_told = True  # whether the source knows of it
        self.rollouts: list[Rollout] = []  # the newest of all tasks
        # The best solve rate between start and end, and its version: (-1, 0) before there is one.
        self.best: tuple[float, int] = (-1.0, 0)

    def draw(self, when: str, params: Any, version: int) -> dict[str, float]:
        """What summary.json says of all tasks, `when` 'before' or 'after' training.

        `params` are the weights of `version`, which is published. The environment CE is of the
        rollouts drawn first, each time: a better agent sees other outputs. Rollouts from before
        training that were lost later are drawn anew by later weights; they have no part in it,
        unless there are no others.
        """
        due = self._due(f'heldout_{when}', self._tasks, version)
        self._source.post(due)
        drawn = self._wait(due)
        sound = [rollout for rollout in drawn if newest_version(rollout) <= version]
        self.rollouts = sound or drawn
        if len(sound) < len(drawn):
            measured = 'the others' if sound else 'these, since there are no others'
            report.CONSOLE.print(
                f'{len(drawn) - len(sound)} of {len(drawn)} rollouts of {due.store} were lost and '
                f'drawn anew by later weights: what is said of "{when}" is of {measured}',
                soft_wrap=True,
            )
        self._fixed = self._fixed or self.rollouts
        ce = env_ce(functools.partial(self._score, params), self._fixed, self._config)
        return summary(when, self.rollouts, ce)

    def post(self, done: int) -> None:
        """Lets an evaluation of version `done` be drawn, if it is time for one.

        After `set_state`, one that was not there yet is posted again.
        """
        tasks = self._tasks[: self._config.eval.tasks]
        is_new = self._posted is None and bool(tasks) and self._is_time(done)
        if is_new:
            self._posted = self._due(f'heldout_{done:06d}', tasks, done)
        if self._posted and (is_new or not self._is_told):
            self._source.post(self._posted)
        self._is_told = True

    def get_state(self) -> dict[str, Any]:
        """What a resumed run has to know, as JSON can hold it."""
        return {'best': self.best, 'posted': self._posted and dataclasses.asdict(self._posted)}

    def set_state(self, state: dict[str, Any]) -> None:
        self.best = tuple(state['best'])
        self._posted = DueGroups.of(state['posted']) if state['posted'] else None
        self._is_told = False

    def collect(self, done: int) -> dict[str, float]:
        """The metrics of the evaluation that was posted before, if one was, and its rollouts are
        there or have to be waited for.

        It is called in each step, after the rollouts of the step after the first `done` are there:
        workers draw both together. If steps do not wait for slow groups, they do not wait for these
        either, until the next evaluation, or the end, is near.
        """
        if self._posted is None:
            return {}
        due, last = self._posted, done + 1
        is_last = last == self._num_steps or self._is_time(last)
        if may_be_late(self._config) and not is_last and not self._source.is_there(due):
            return {}
        rollouts = self._wait(due)
        self._posted = None
        values = evaluation_metrics(rollouts)
        if values.get('eval/solve_rate', -1.0) > self.best[0]:
            self.best = (values['eval/solve_rate'], due.version)
        return values

    def env_ce(self, done: int, params: Any) -> dict[str, float]:
        """The environment CE of the rollouts drawn before training, as metrics, if it is time."""
        if not self._is_time(done):
            return {}
        return eval_metrics(
            env_ce(functools.partial(self._score, params), self._fixed, self._config)
        )

    @property
    def kept_versions(self) -> list[int]:
        """The versions whose saves are kept beside the last ones: the best, and one whose
        evaluation is still under way.
        """
        if not self._config.checkpoint.keep_best:
            return []
        return [self.best[1], *([self._posted.version] if self._posted else [])]

    def wants_save(self, done: int) -> bool:
        """Whether version `done` has to be saved, since it may be the best."""
        return self._config.checkpoint.keep_best and self._is_time(done)

    def _is_time(self, done: int) -> bool:
        return done % self._config.eval.every == 0 and 0 < done < self._num_steps

    def _due(self, store: str, tasks: Sequence[Task], version: int) -> DueGroups:
        return DueGroups(
            store=store,
            split='heldout',
            first_group=0,
            task_ids=tuple(task.task_id for task in tasks),
            group_size=self._config.eval.samples,
            temperature=self._config.eval.temperature,
            version=version,
        )

    def _wait(self, due: DueGroups) -> list[Rollout]:
        return [rollout for group in self._source.wait(due) for rollout in group]


def newest_version(rollout: Rollout) -> int:
    """The newest version that sampled a token of it; -1 if none was sampled."""
    return int(rollout.action_versions.max(initial=-1))


def summary(when: str, rollouts: Sequence[Rollout], ce: dict[str, float]) -> dict[str, float]:
    """What summary.json says of held-out rollouts, `when` 'before' or 'after', and of `env_ce`."""
    # A run whose every rollout is an INFRA_ERROR has solved nothing.
    rate = _rates(rollouts).get('1', Estimate(0.0, 0.0, 1.0))
    values = _spread('solve_rate', rate, '_') | {'env_ce': ce['all']}
    values |= {'env_ce_output': ce['output']} if 'output' in ce else {}
    values['imagined'] = imagined(rollouts)
    return {f'{name}_{when}': value for name, value in values.items()}


def evaluation_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Metrics `eval/...` of rollouts that were drawn between start and end.

    Those of INFRA_ERRORs have no part in it, and if there are no others there are no rates.
    """
    rates = _rates(rollouts)
    values = _spread('eval/solve_rate', rates.pop('1', None), '/')
    values |= {f'eval/pass@{k}': rate.mean for k, rate in rates.items()}
    versions = np.concatenate([*(r.action_versions for r in rollouts), np.zeros(0, np.int32)])
    if len(versions):
        values |= {
            'eval/version': float(versions.min()),
            'eval/version_newest': float(versions.max()),
        }
    return values


def eval_metrics(ce: dict[str, float]) -> dict[str, float]:
    """What `env_ce` gives, as metrics of a step: `eval/env_ce` and `eval/env_ce/ROLE`."""
    return {f'eval/env_ce/{role}'.removesuffix('/all'): value for role, value in ce.items()}


def _rates(rollouts: Sequence[Rollout]) -> dict[str, Estimate]:
    samples = max((r.sample_id for r in rollouts), default=0) + 1
    return pass_rates([result_of(r) for r in rollouts], samples)


def _spread(name: str, rate: Estimate | None, mark: str) -> dict[str, float]:
    """A rate and the ends of its interval, by their names; nothing if there is no rate."""
    if rate is None:
        return {}
    return {name: rate.mean, f'{name}{mark}low': rate.low, f'{name}{mark}high': rate.high}
