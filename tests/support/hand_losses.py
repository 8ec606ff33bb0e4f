"""Small batches for tests of the losses, and the objective as a function of a table of tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.learner.losses import echo_loss
from echo_jax.types import Batch
from tests.support.objective import VOCABULARY
from tests.support.random_rollouts import make_rollout


def by_token(table, batch):
    """[R, T] from a value for each token; padding is NaN, to see that it is masked."""
    return jnp.where(batch.segment_ids > 0, jnp.asarray(table)[batch.tokens], jnp.nan)


def tables(seed=0, scale=0.3):
    """Log-probabilities of each token: learner, old policy, reference."""
    rng = np.random.default_rng(seed)
    current = -rng.uniform(0.1, 3, VOCABULARY)
    return current, *(current + scale * rng.normal(size=(2, VOCABULARY)))


def loss_of_table(table, batch, config, env_coef, old, frozen):
    return echo_loss(
        by_token(table, batch),
        batch,
        config,
        env_coef,
        old_logprobs=by_token(old, batch),
        reference_logprobs=by_token(frozen, batch),
        entropy=by_token(-table, batch),
    )


value_and_grad = jax.value_and_grad(loss_of_table, has_aux=True)


loss_and_gradient = jax.value_and_grad(echo_loss, has_aux=True)


def hand_batch():
    """One rollout: prompt, two actions, a wrapper, an output; advantage 2, weights 1/2 and 1/4."""

    def make(*values):
        return np.array([values], np.float32)

    return Batch(
        tokens=np.array([[5, 6, 7, 8, 9, 0]], np.int32),
        positions=np.array([[0, 1, 2, 3, 4, 0]], np.int32),
        segment_ids=np.array([[1, 1, 1, 1, 1, 0]], np.int32),
        roles=np.array([[0, 1, 1, 5, 6, 0]], np.uint8),
        rollout_logprobs=make(0, -1.5, -1.0, 0, 0, 0),
        old_logprobs=make(0, 0, 0, 0, 0, 0),
        advantages=make(0, 2, 2, 0, 0, 0),
        policy_weight=make(0, 0.5, 0.5, 0, 0, 0),
        env_weight=make(0, 0, 0, 0.25, 0.25, 0),
    )


def example():
    return [
        make_rollout('PPAAWROOSAAF', reward=1.0, sample=0),
        make_rollout('PAAAROOO', reward=0.0, sample=1, first_token=20),
        make_rollout('PPAFA', reward=0.0, sample=2, first_token=40),
        make_rollout('PPPP', reward=0.5, group=1, sample=0, first_token=60),
    ]
