"""Every policy loss: by hand, against finite differences, at its first step, without an environment
term. test_next_to_nothing.py has the batches that hold next to nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.learner.batching import REDUCTIONS, make_batch
from echo_jax.learner.losses import echo_loss, finish_metrics, policy_term
from echo_jax.learner.policy_losses import SURROGATES, Bounds, Tokens
from tests.support.hand_losses import (
    by_token,
    example,
    hand_batch,
    loss_and_gradient,
    loss_of_table,
    tables,
    value_and_grad,
)
from tests.support.objective import VOCABULARY
from tests.support.random_rollouts import make_rollout, small_config

POLICIES = pytest.mark.parametrize('policy', SURROGATES)
# Log-probabilities of the two actions -1 and -2, of the sampler -1.5 and -1: ratios
# exp(0.5) = 1.648721 and exp(-1) = 0.367879. Probabilities 0.367879 and 0.135335, of the sampler
# 0.223130 and 0.367879, so they moved by 0.144749 and 0.232544. The weights are 1/2.
LOGPROBS = [[jnp.nan, -1.0, -2.0, -3.0, -0.5, jnp.inf]]


@pytest.mark.parametrize(
    ('advantage', 'options', 'loss', 'gradient', 'shares'),
    [
        # A > 0, as 'clip': -(1.28 x 2 + 0.367879 x 2)/2.
        (2, {'policy': 'dual_clip'}, -1.647879, (0, -0.367879), {'clip': 0.5, 'dual_clip': 0}),
        # A < 0. The first is at most 1.5 x 2, although its ratio is 1.6487; the second's bound is
        # 0.8, as in 'clip': (3 + 1.6)/2.
        (
            -2,
            {'policy': 'dual_clip', 'dual_clip': 1.5},
            2.3,
            (0, 0),
            {'clip': 0.5, 'dual_clip': 0.5},
        ),
        # 1.7 x 2 = 3.4 is above 1.648721 x 2 = 3.297442: (3.297442 + 1.6)/2.
        (
            -2,
            {'policy': 'dual_clip', 'dual_clip': 1.7},
            2.448721,
            (1.648721, 0),
            {'clip': 0.5, 'dual_clip': 0},
        ),
        # The rollout's ratio exp((0.5 - 1)/2) = 0.778801, which min leaves with A > 0; each of the
        # two tokens has half of its gradient.
        (2, {'policy': 'gspo'}, -1.557602, (-0.778801, -0.778801), {'clip': 0}),
        # With A < 0 the bound is 0.8, for both.
        (-2, {'policy': 'gspo'}, 1.6, (0, 0), {'clip': 1}),
        (-2, {'policy': 'gspo', 'clip_low': 0.3}, 1.557602, (0.778801, 0.778801), {'clip': 0}),
        # Ratios held at 1.28 and 0.8, times log p: 1.28 x 1 + 0.8 x 2. Both keep a gradient.
        (2, {'policy': 'cispo'}, 2.88, (-1.28, -0.8), {'clip': 1}),
        # The paper's CISPO has no lower bound: 1.28 x 1 + 0.367879 x 2.
        (2, {'policy': 'cispo', 'clip_low': 1.0}, 2.015759, (-1.28, -0.367879), {'clip': 0.5}),
        # The first moved by 0.1447 > 0.1 and would move on; the second comes back.
        (2, {'policy': 'dppo', 'dppo_tv': 0.1}, -0.367879, (0, -0.367879), {'masked': 0.5}),
        (2, {'policy': 'dppo', 'dppo_tv': 0.2}, -2.0166, (-1.648721, -0.367879), {'masked': 0}),
        # With A < 0 it is the other way round: 0.2325 > 0.2 and r < 1.
        (-2, {'policy': 'dppo', 'dppo_tv': 0.2}, 1.648721, (1.648721, 0), {'masked': 0.5}),
    ],
)
def test_by_hand(advantage, options, loss, gradient, shares):
    config = small_config(old_logprobs='rollout', clip_high=0.28, **options)
    batch = hand_batch()
    batch = batch._replace(advantages=np.where(batch.advantages, np.float32(advantage), 0))
    (value, metrics), found = loss_and_gradient(jnp.array(LOGPROBS), batch, config, 0)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(found, [[0, *gradient, 0, 0, 0]], rtol=1e-5)
    metrics = finish_metrics(metrics)
    named = {name: value for name, value in metrics.items() if name.endswith('_fraction')}
    assert named == {f'{name}_fraction': value for name, value in shares.items()}


@pytest.mark.parametrize(
    ('old', 'new', 'advantage', 'is_masked'),
    [
        (0.50, 0.80, 1, True),  # |p - old p| = 0.3 > 0.15, and p rises further
        (0.50, 0.80, -1, False),  # it comes back
        (0.50, 0.20, -1, True),
        (0.50, 0.20, 1, False),
        (0.50, 0.64, 1, False),  # 0.14; 'clip' would cut r = 1.28 at 1.2
        (0.50, 0.66, 1, True),
        (0.90, 0.76, -1, False),
        (0.90, 0.74, -1, True),  # 0.16, and r = 0.82 is within 0.2 of 1
        (0.001, 0.1, 1, False),  # r = 100, and p moved by 0.099
        (0.1, 0.001, -1, False),
    ],
)
def test_the_mask_by_total_variation_by_hand(old, new, advantage, is_masked):
    """Of a token's two outcomes, itself and all others: (|p - q| + |(1 - p) - (1 - q)|) / 2."""
    logprobs, before = np.log([[new]]), np.log([[old]])
    advantages, acting = np.full((1, 1), advantage, float), np.ones((1, 1), bool)
    bounds = Bounds(clip_low=0.2, clip_high=0.2, dual_clip=3.0, dppo_tv=0.15)

    def value(logprobs):
        log_ratio = logprobs - before
        tokens = Tokens(
            logprobs, before, log_ratio, jnp.exp(log_ratio), advantages, acting, np.ones((1, 1))
        )
        gain, shares = SURROGATES['dppo'](tokens, bounds)
        return gain.sum(), shares['masked_fraction']

    (gain, masked), gradient = jax.value_and_grad(value, has_aux=True)(jnp.asarray(logprobs))
    assert masked.item() == is_masked
    expected = 0.0 if is_masked else advantage * new / old
    np.testing.assert_allclose([gain, gradient.item()], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_rollouts_ratio_is_of_its_action_tokens_alone_in_a_packed_row():
    rollouts = [make_rollout('PAAOAA', reward=1.0), make_rollout('PAOA', sample=1, first_token=11)]
    config = small_config(policy='gspo', old_logprobs='recomputed', advantages='dr_grpo')
    batch = make_batch(rollouts, config)
    # The four actions moved by 0.1, -0.2, 0.3 and 0, the two of the second by 0.2 and 0.1; what
    # moved elsewhere does not count.
    moved = np.full(batch.tokens.shape, 9.0)
    moved[0, [1, 2, 4, 5, 7, 9]] = [0.1, -0.2, 0.3, 0.0, 0.2, 0.1]

    def loss(logprobs):
        return echo_loss(logprobs, batch, config, 0, old_logprobs=logprobs_0)[0]

    logprobs_0 = jnp.full(batch.tokens.shape, -1.0)
    gradient = jax.grad(loss)(logprobs_0 + moved)
    # exp(0.2/4) and exp(0.3/2), A = 1/2 and -1/2, over 2 x 4 and 2 x 2.
    np.testing.assert_allclose(gradient[0, [1, 2, 4, 5]], -1.051271 / 16, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, [7, 9]], 1.161834 / 8, rtol=1e-5)
    assert np.count_nonzero(gradient) == 6


@pytest.mark.slow
@pytest.mark.parametrize('old_logprobs', ['current', 'recomputed', 'rollout'])
@POLICIES
def test_gradient_is_the_finite_difference(policy, old_logprobs):
    options = {'policy': policy, 'kl_coef': 0.2, 'dual_clip': 1.1, 'dppo_tv': 0.01}
    # A rollout's ratio is nearer to 1 than its tokens'.
    options |= dict.fromkeys(('clip_low', 'clip_high'), 0.005 if policy == 'gspo' else 0.05)
    rollouts = example()
    current, old, frozen = tables(scale=0.1)
    for r in rollouts:
        r.rollout_logprobs = old[r.tokens].astype(np.float32)
    config = small_config(old_logprobs=old_logprobs, **options)
    held = small_config(old_logprobs='recomputed', **options)
    with jax.enable_x64(True):
        batch = make_batch(rollouts, config)
        # 'current' has a constant ratio, so its difference is that of the old policy held at here.
        before = current if old_logprobs == 'current' else old
        probe = held if old_logprobs == 'current' else config
        (_, metrics), gradient = value_and_grad(current, batch, config, 0.05, old, frozen)
        bound = 'masked_fraction' if policy == 'dppo' else 'clip_fraction'
        assert (finish_metrics(metrics)[bound] > 0) == (old_logprobs != 'current')
        used = np.unique(batch.tokens[(batch.policy_weight > 0) | (batch.env_weight > 0)])
        assert len(used) > 15
        coefficient = np.zeros(VOCABULARY)
        if policy == 'cispo':
            # Its ratio is a constant, which differences do not know: of w held(r) A log p they see
            # the slope of the whole. That constant's own slope is taken out by hand.
            ratio = np.exp(by_token(current - before, batch))
            inside = (ratio > 0.95) & (ratio < 1.05) & (batch.policy_weight > 0)
            extra = -batch.policy_weight * ratio * batch.advantages * by_token(current, batch)
            np.add.at(coefficient, batch.tokens, np.where(inside, extra, 0.0))
        steps = 1e-6 * np.eye(VOCABULARY)[used]

        @jax.jit
        @jax.vmap
        def value(table):
            return loss_of_table(table, batch, probe, 0.05, before, frozen)[0]

        slopes = (value(current + steps) - value(current - steps)) / 2e-6
        np.testing.assert_allclose(gradient[used], slopes - coefficient[used], rtol=1e-5, atol=1e-8)


@POLICIES
@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('old_logprobs', ['current', 'recomputed'])
def test_the_first_step_has_the_gradient_of_grpo(policy, reduction, old_logprobs):
    """The old policy is the current one, so every ratio is 1, and the gradient -w A on a token."""
    config = small_config(policy=policy, reduction=reduction, old_logprobs=old_logprobs)
    batch = make_batch(example(), config)
    logprobs = by_token(tables()[0].astype(np.float32), batch)

    def loss(logprobs):
        old = jax.lax.stop_gradient(logprobs)
        return echo_loss(logprobs, batch, config, 0, old_logprobs=old)[0]

    expected = -batch.policy_weight * batch.advantages
    assert np.count_nonzero(expected) > 5
    # 'gspo' adds a rollout's tokens up and divides by their number, which rounds.
    np.testing.assert_allclose(
        jax.grad(loss)(logprobs), expected, rtol=1e-6 if policy == 'gspo' else 0
    )


@pytest.mark.slow
@POLICIES
@pytest.mark.parametrize('old_logprobs', ['current', 'recomputed', 'rollout'])
def test_env_coef_zero_is_the_policy_term_bit_for_bit(policy, old_logprobs):
    """Loss and gradient, through a softmax; test_losses.py compares 'clip' with GRPO by hand."""
    config = small_config(policy=policy, old_logprobs=old_logprobs)
    batch = make_batch(example(), config)
    before = batch.rollout_logprobs
    logits = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 64))

    def logprobs_of(scale):
        logprobs = jax.nn.log_softmax(scale * logits)
        return jnp.take_along_axis(logprobs, batch.tokens[..., None], -1)[..., 0]

    def alone(scale):
        logprobs = logprobs_of(scale)
        old = logprobs if old_logprobs == 'current' else before
        bounds = Bounds(*(config.loss[name] for name in Bounds._fields))
        settings = {'bounds': bounds, 'mismatch': 'none', 'mismatch_cap': 2.0}
        return policy_term(logprobs, old, batch, surrogate=SURROGATES[policy], **settings)[0]

    def echo(scale, env_coef):
        return echo_loss(logprobs_of(scale), batch, config, env_coef, old_logprobs=before)[0]

    scale = jnp.linspace(0.5, 2, 64)
    expected = jax.jit(jax.value_and_grad(alone))(scale)
    static = jax.jit(jax.value_and_grad(lambda s: echo(s, 0)))(scale)
    traced = jax.jit(jax.value_and_grad(echo))(scale, jnp.float32(0))
    other = jax.jit(jax.value_and_grad(echo))(scale, jnp.float32(0.05))
    for got in (static, traced):
        assert got[0] == expected[0]
        np.testing.assert_array_equal(got[1], expected[1])
    assert np.abs(expected[1]).max() > 1e-3
    assert not np.array_equal(other[1], expected[1])
