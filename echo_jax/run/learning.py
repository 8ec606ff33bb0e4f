"""The updates of one step: its rollouts as batches on the mesh, and the optimizer's steps on them.

A step has one batch and, with `batch.updates` and `batch.epochs`, several updates on it
(docs/design.md#updates). What a batch holds is the learner's business; this brings the parts
together that need the mesh, the tokenizer and the parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from echo_jax.learner import batching, eligibility, sharding, updates
from echo_jax.learner.kl import reward_less_kl
from echo_jax.learner.step import ShardedModel, TrainState
from echo_jax.learner.targets import Targets
from echo_jax.run.env_term import EnvTerm
from echo_jax.run.measures import seconds_under_time
from echo_jax.run.report import check_finite
from echo_jax.store.scores import ScoreStore
from echo_jax.types import Role, Rollout, TokenScores


class Learner:
    """Learns the rollouts of a step. Every host of a learner has one, and all do the same."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: ShardedModel,
        step: Callable[..., tuple[TrainState, Any]],
        env_term: EnvTerm,
        reference: nnx.State | None,
        scores: ScoreStore | None = None,
    ):
        """step: of `ShardedModel.step`, which keeps scores if there is a store for them.
        reference: the frozen parameters of `loss.kl_coef`.
        """
        self._config, self._model, self._step = config, model, step
        self._scores = scores
        self._env_term, self._reference = env_term, reference
        self._with_old_logprobs = model.with_old_logprobs()
        self._score = model.score(config.policy.temperature)

    def learn(
        self, state: TrainState, rollouts: Sequence[Rollout], done: int
    ) -> tuple[TrainState, dict[str, float]]:
        """The state after the step that follows the first `done`, and the step's metrics.

        Raises FloatingPointError if one of them is not finite, so that no such weights come out.
        """
        config, term = self._config, self._env_term
        targets, values = term.targets(rollouts, state.params)
        learned = self._less_kl(rollouts, targets)
        batches = [
            self._with_old_logprobs(state.params, sharding.put_batch(batch, self._model.mesh))
            for batch in updates.mini_batches(learned, config, done, targets)
        ]
        values |= term.balance(done, state.params, batches[0], self._reference)
        sums, scores = [], {}
        for number in updates.order(config, done):
            state, added, *kept = self._step(
                state, batches[number], term.coef(done), self._reference
            )
            sums.append(added)
            scores.setdefault(number, kept)  # of the first epoch
        if self._scores:
            passes = [scores[number][0] for number in range(len(batches))]
            self._keep(self._scores, passes, learned, done)
        values |= {f'train/{name}': v for name, v in updates.finish_updates(sums).items()}
        values |= seconds_under_time(batching.rollout_metrics(rollouts, done))
        values |= batching.age_metrics(rollouts, done, config.max_staleness)
        values |= eligibility.eligibility_metrics(learned, config.loss)
        check_finite(done + 1, values)
        return state, values

    def _keep(
        self,
        store: ScoreStore,
        scores: Sequence[TokenScores],
        learned: Sequence[Rollout],
        done: int,
    ) -> None:
        """Writes the scores of each mini-batch by rollout, and removes the oldest: as many groups
        are kept as `logging.scores` steps have, and as can be in flight beside them, since a slow
        group has a low number.

        A rollout that no update learned from has none, nor has one whose scores are not finite: if
        that ends the run, its metrics say so.
        """
        groups: dict[int, dict[int, TokenScores]] = {}
        parts = updates.rollouts_of(learned, self._config, done)
        for part, found in zip(parts, jax.device_get(list(scores))):
            columns = (batching.unpack(part, values, self._config) for values in found)
            for rollout, *arrays in zip(part, *columns):
                is_finite = all(np.isfinite(array).all() for array in arrays)
                if is_finite and eligibility.counts(rollout, self._config.loss):
                    samples = groups.setdefault(rollout.group_id, {})
                    samples[rollout.sample_id] = TokenScores(*arrays)
        for group_id, samples in groups.items():
            store.write_group(group_id, samples)
        config = self._config
        steps = config.logging.scores + config.max_staleness
        newest = store.groups()[-(steps * config.batch.groups + config.batch.oversample) :]
        store.keep(min(newest, default=0))

    def _less_kl(self, rollouts: Sequence[Rollout], targets: Sequence[Targets]) -> list[Rollout]:
        """The rollouts with `loss.kl_coef` times their KL off their rewards, for `loss.kl_in`
        'reward'; else as they are. One more pass forward, of the frozen model.
        """
        config, loss = self._config, self._config.loss
        if not loss.kl_coef or loss.kl_in != 'reward':
            return list(rollouts)
        batch = batching.make_batch(rollouts, config, targets)
        frozen = np.asarray(self._score(self._reference, batch))
        changed = []
        for rollout, logprobs in zip(rollouts, batching.unpack(rollouts, frozen, config)):
            reward = reward_less_kl(
                rollout.reward,
                rollout.rollout_logprobs,
                logprobs,
                rollout.roles == Role.ACTION,
                kl=loss.kl,
                kl_coef=loss.kl_coef,
            )
            changed.append(dataclasses.replace(rollout, reward=reward))
        return changed
