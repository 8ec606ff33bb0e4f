"""The environment term of a run's steps: which tokens it learns, and how much it weighs.

It brings together what single parts of the learner do (docs/design.md#targets): the tokenizer for
the rule that reads text, the policy for the surprise of tokens, the two gradients for the
coefficient that follows them. Nothing here does anything unless its key asks for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import transformers

from echo_jax.learner import batching, env_coef
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.surprise import drop_by_surprise
from echo_jax.learner.targets import Targets, choose_targets
from echo_jax.learner.unpredictable import Unpredictable
from echo_jax.types import Batch, Rollout

# (params, batch) -> log-probabilities at temperature 1, [R, T]: learner.step.make_score.
Score = Callable[[Any, Batch], jax.Array]


class EnvTerm:
    """Chooses the targets of each step and says the coefficient of each update.

    Every host of a learner has one, and all find the same, since they read the same rollouts and
    get the whole of what is computed.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        num_steps: int,
        tokenizer: transformers.PreTrainedTokenizerFast,
        score: Score,
        balance: Callable,
    ):
        """balance: `ShardedModel.balance()`."""
        self._config, self._num_steps = config, num_steps
        self._score, self._gradients = score, balance
        self._rule = Unpredictable(tokenizer) if config.loss.drop_unpredictable else None
        # What `loss.env_adaptive` has made of the coefficient so far. A checkpoint keeps it.
        self.adapted = float(config.loss.env_coef)

    def targets(
        self, rollouts: Sequence[Rollout], params: Any
    ) -> tuple[list[Targets], dict[str, float]]:
        """The targets of each rollout of a step, for `make_batch`, and the metrics `train/env_...`.

        `params` are the policy's, before the step's first update.
        """
        targets, counts = choose_targets(rollouts, self._config, self._rule)
        dropped = self._config.loss.drop_surprising
        if dropped.top or dropped.bottom:
            before = sum(t.chosen.sum() for t in targets)
            batch = batching.make_batch(rollouts, self._config, targets)
            logprobs = np.asarray(self._score(params, batch), np.float64)
            by_rollout = batching.unpack(rollouts, logprobs, self._config)
            targets = drop_by_surprise(targets, by_rollout, dropped.top, dropped.bottom)
            counts['env_dropped/surprising'] = float(before - sum(t.chosen.sum() for t in targets))
        return targets, {f'train/{name}': value for name, value in counts.items()}

    def coef(self, done: int) -> float | jax.Array:
        """The coefficient of the step after the first `done`: a number if none changes it."""
        value = self._value(done)
        return jnp.float32(value) if env_coef.is_traced(self._config.loss) else value

    def balance(
        self, done: int, params: Any, batch: Batch, reference: Any = None
    ) -> dict[str, float]:
        """Measures the two gradients if it is time, for `eval.balance` or to move the coefficient
        by `loss.env_adaptive`, and returns metrics.

        It is called before the step after the first `done`, with the batch on the mesh, or with the
        first mini-batch of several. The parameters stay as they are.
        """
        loss = self._config.loss
        adapts = loss.env_adaptive.every and done % loss.env_adaptive.every == 0
        values = {}
        if adapts or self._shows_balance(done + 1):
            found = finish_metrics(self._gradients(params, batch, reference))
            values = {f'train/{name}': value for name, value in found.items()}
            if adapts:
                norms = found['grad_norm_policy'], found['grad_norm_env']
                self.adapted = env_coef.adapted(self.adapted, *norms, loss.env_adaptive)
        if env_coef.is_traced(loss):
            values['train/env_coef'] = self._value(done)
        return values

    def _shows_balance(self, step: int) -> bool:
        """Whether `eval.balance` is due in this step, counted from 1."""
        options = self._config.eval
        return options.balance and (step in (1, self._num_steps) or step % options.every == 0)

    def _value(self, done: int) -> float:
        if self._config.loss.env_adaptive.every:
            return self.adapted
        return env_coef.scheduled(self._config.loss, done, self._num_steps)
