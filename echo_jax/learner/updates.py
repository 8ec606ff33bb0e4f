"""Cuts the batch of a step into mini-batches, and orders its updates (docs/design.md#updates).

On the host. Everything is a function of the seed and of the step's number, so that a resumed
run does what a run left alone does. step.py makes one update.
"""

from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from echo_jax.learner.batching import Judged, batch_rows, judge, weigh
from echo_jax.learner.losses import Metric, Metrics, finish_metrics
from echo_jax.learner.targets import Targets
from echo_jax.types import Batch, Rollout

MINI = ('groups', 'rollouts')


def updates_of_step(config: ml_collections.ConfigDict) -> int:
    """How many updates of the optimizer a batch gets."""
    return config.batch.updates * config.batch.epochs


def scores_before(config: ml_collections.ConfigDict) -> bool:
    """Whether the old log-probabilities are to be computed before the first update of a batch."""
    return config.loss.old_logprobs == 'recomputed' and updates_of_step(config) > 1


def check_cut(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError if the batch of the recipe cannot be cut as it says."""
    batch = config.batch
    if batch.mini not in MINI:
        raise ValueError(f'batch.mini is {batch.mini!r}; expected one of {MINI}')
    count = batch.groups if batch.mini == 'groups' else batch.groups * config.group_size
    if count % batch.updates:
        # Mini-batches of unequal size would weigh their rollouts unequally.
        raise ValueError(
            f'batch.updates={batch.updates} does not divide the {count} {batch.mini} of a batch; '
            'change one of them, or batch.mini'
        )


def mini_batches(
    rollouts: Sequence[Rollout],
    config: ml_collections.ConfigDict,
    step: int,
    targets: Sequence[Targets] | None = None,
) -> list[Batch]:
    """The `batch.updates` mini-batches of step number `step`, all of one shape.

    Advantages, and which groups have equal rewards, are those of the whole batch; `targets` are as
    for `make_batch`. The weights are those that `make_batch` would give to a mini-batch's rollouts
    if there were no others.
    """
    judged, of = judge(rollouts, config, targets), _cut(rollouts, config, step)
    parts: list[list[Judged]] = [[] for _ in range(config.batch.updates)]
    for each in judged:
        parts[of[_unit(each.rollout, config)]].append(each)
    rows = batch_rows(config, len(parts))
    return [weigh(part, config, rows) for part in parts]


def rollouts_of(
    rollouts: Sequence[Rollout], config: ml_collections.ConfigDict, step: int
) -> list[list[Rollout]]:
    """The rollouts that each of the `mini_batches` is made of, in their order."""
    of = _cut(rollouts, config, step)
    return [
        [r for r in rollouts if of[_unit(r, config)] == number]
        for number in range(config.batch.updates)
    ]


def order(config: ml_collections.ConfigDict, step: int) -> list[int]:
    """Which mini-batch each update of the step takes; every epoch takes all, shuffled anew."""
    return [
        int(number)
        for epoch in range(1, config.batch.epochs + 1)  # 0 is the cut
        for number in _random(config, step, epoch).permutation(config.batch.updates)
    ]


def finish_updates(metrics: Sequence[Metrics]) -> dict[str, float]:
    """The numbers of a step from the metrics of its updates, in their order.

    A mean is over the tokens of all updates, so that a token counts once an epoch, and `..._tokens`
    are sums. Other sums, the losses, are means over the updates, for each is normalised by its own
    mini-batch. `grad_norm` is the mean; the last update's is `grad_norm_last`.
    """
    if len(metrics) == 1:
        return finish_metrics(metrics[0])
    found: list[Metrics] = jax.device_get(list(metrics))
    merged = {}
    for name in found[0]:
        added = sum(float(each[name].sum) for each in found)
        if found[0][name].count is not None:
            count = sum(float(each[name].count or 0.0) for each in found)
        else:
            count = None if name.endswith('_tokens') else float(len(found))
        merged[name] = Metric(added, count)
    return finish_metrics(merged) | {'grad_norm_last': float(found[-1]['grad_norm'].sum)}


def _unit(rollout: Rollout, config: ml_collections.ConfigDict) -> tuple[int, ...]:
    """What stays whole when the batch is cut: a group's number, or a rollout's place."""
    group = (rollout.group_id,)
    return group if config.batch.mini == 'groups' else (*group, rollout.sample_id)


def _cut(
    rollouts: Sequence[Rollout], config: ml_collections.ConfigDict, step: int
) -> dict[tuple[int, ...], int]:
    """The number of the mini-batch of each unit; every one gets equally many, give or take one."""
    # INFRA_ERRORs are cut too, so that one more of them does not move all others.
    units = sorted({_unit(r, config) for r in rollouts})
    shuffled = _random(config, step, 0).permutation(len(units))
    parts = np.array_split(shuffled, config.batch.updates)
    return {units[i]: number for number, part in enumerate(parts) for i in part}


def _random(config: ml_collections.ConfigDict, step: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, step, epoch])
