"""Batches that hold next to nothing: each policy loss by each reduction, in the loss and in a step.

They are ordinary cases: finite numbers, and no weight where there is nothing to learn.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from echo_jax.learner import sharding
from echo_jax.learner.batching import REDUCTIONS, make_batch
from echo_jax.learner.losses import echo_loss, finish_metrics
from echo_jax.learner.mismatch import CORRECTIONS
from echo_jax.learner.policy_losses import SURROGATES
from echo_jax.learner.step import ShardedModel
from echo_jax.types import Status
from tests.support.hand_losses import by_token, example, tables
from tests.support.random_rollouts import add_model, make_rollout, small_config


def all_of(status, **changes):
    return [dataclasses.replace(r, status=status, **changes) for r in example()]


def group(roles, status=Status.OK, rewards=(1.0, 0.0)):
    return [
        make_rollout(roles, reward, 0, i, status, first_token=1 + 8 * i)
        for i, reward in enumerate(rewards)
    ]


ROWS = {
    'an empty batch': [],
    'no tokens': [make_rollout('', reward=1.0)],
    'no action token': group('PPOO'),
    'no environment token': group('PPAAA'),
    'one token': group('A'),
    'a group of one': [make_rollout('PAAO', 1.0)],
    'all truncated': all_of(Status.TRUNCATED),
    'all out of time': all_of(Status.AGENT_TIMEOUT),
    'all discarded': group('PP', Status.AGENT_TIMEOUT, rewards=(0.0, 0.0, 0.0)),
    'all INFRA_ERROR': all_of(Status.INFRA_ERROR, reward=float('nan')),
    'all environment_only': [dataclasses.replace(r, environment_only=True) for r in example()],
}
LEARNED = {'no environment token'}  # by the policy term
OBSERVED = {
    *('no action token', 'a group of one', 'all environment_only'),
    *('all truncated', 'all out of time'),
}
OPTIONS = [
    {
        'policy': policy,
        'reduction': reduction,
        # Each of these occurs with each reduction, and both kinds of the others.
        'mismatch': list(CORRECTIONS)[(i + j) % len(CORRECTIONS)],
        'advantages': 'maxrl' if (i + j) % 2 else 'grpo',
        'kl': 'k3' if i % 2 else 'k2',  # k1 has a gradient where the policy has not moved
        'kl_coef': 0.1,
        'mask_truncated': True,
        'count_truncated': bool(j % 2),
    }
    for i, policy in enumerate(SURROGATES)
    for j, reduction in enumerate(REDUCTIONS)
]


def test_the_rows_hold_what_they_say():
    for name, rollouts in ROWS.items():
        for options in OPTIONS[:4]:
            batch = make_batch(rollouts, small_config(**options))
            assert all(np.isfinite(array).all() for array in batch)
            assert batch.env_weight.any() == (name in OBSERVED)
            assert (batch.policy_weight * batch.advantages).any() == (name in LEARNED)


@functools.cache
def compiled_loss(**options):
    config = small_config(**options)

    def of(logprobs, batch, frozen):
        def objective(current):
            return echo_loss(current, batch, config, 0.05, reference_logprobs=frozen)

        return jax.value_and_grad(objective, has_aux=True)(logprobs)

    return jax.jit(of)


@pytest.mark.parametrize('rollouts', ROWS.values(), ids=ROWS)
@pytest.mark.parametrize('options', OPTIONS, ids=lambda o: f'{o["policy"]}-{o["reduction"]}')
def test_the_loss(rollouts, options):
    batch = make_batch(rollouts, small_config(**options))
    # NaN where there is no token. The KL is that of a policy that has not moved: 0.
    logprobs = by_token(tables()[0].astype(np.float32), batch)
    (value, metrics), gradient = compiled_loss(**options)(logprobs, batch, logprobs)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    metrics = finish_metrics(metrics)
    assert all(np.isfinite(number) for number in metrics.values())
    # A token without an advantage has no gradient but the environment term's.
    still = batch.policy_weight * batch.advantages == 0
    expected = np.where(still, -0.05 * batch.env_weight, gradient)
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    if still.all():
        assert metrics['policy_loss'] == 0
    if not batch.env_weight.any():
        assert metrics['env_loss'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('policy', SURROGATES)
def test_a_step(policy):
    """The real model's step, with old log-probabilities, on every row by every reduction."""
    config = small_config(policy=policy, old_logprobs='recomputed', mask_truncated=True)
    config.batch.epochs = 2
    add_model(config, vocab_size=100)
    model = ShardedModel.of(config, jax.devices()[:1])
    step, _, first_state = model.step(config.optimizer)
    params = jax.device_get(model.random_params())
    with_old_logprobs = model.with_old_logprobs()
    for reduction in REDUCTIONS:
        config.loss.reduction = reduction
        for name, rollouts in ROWS.items():
            state = first_state(params)
            batch = sharding.put_batch(make_batch(rollouts, config), model.mesh)
            batch = with_old_logprobs(state.params, batch)
            for _ in range(config.batch.epochs):
                state, metrics = step(state, batch, 0.05, None)
            metrics = finish_metrics(metrics)
            assert all(np.isfinite(value) for value in metrics.values()), name
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)), name
            assert (metrics['grad_norm'] > 0) == (name in LEARNED | OBSERVED), name
