import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.learner.batching import make_batch, make_supervised_batch
from echo_jax.learner.kl import KL_ESTIMATORS
from echo_jax.learner.losses import (
    Metric,
    cross_entropy,
    echo_loss,
    finish_metrics,
    policy_term,
    total,
)
from echo_jax.learner.mismatch import CORRECTIONS
from echo_jax.learner.policy_losses import SURROGATES, Bounds
from echo_jax.types import Batch, Role
from tests.support.hand_losses import example, hand_batch, loss_and_gradient, tables, value_and_grad
from tests.support.objective import reference
from tests.support.random_rollouts import loss_settings, make_rollout, rollout_lists, small_config


def test_current_by_hand():
    logprobs = jnp.array([[jnp.nan, -1.0, -2.0, -3.0, -0.5, jnp.inf]])
    config = small_config()
    (total, metrics), gradient = loss_and_gradient(logprobs, hand_batch(), config, 0.1)
    # Ratios are 1: policy -(2 + 2)/2 = -2; env (3 + 0.5)/4 = 0.875; -2 + 0.0875.
    np.testing.assert_allclose(total, -1.9125, rtol=1e-6)
    # d policy = -A/2 = -1 on actions; d env = -0.1/4 on targets; nothing from NaN and inf.
    np.testing.assert_allclose(gradient, [[0, -1, -1, -0.025, -0.025, 0]], rtol=1e-6)
    metrics = finish_metrics(metrics)
    expected = {
        'loss': -1.9125,
        'policy_loss': -2,
        'env_loss': 0.875,
        'clip_fraction': 0,
        'ratio_deviation': 0,
        'approx_kl': 0,
        'logprob_gap': (0.5 + 1) / 2,  # |-1 + 1.5|, |-2 + 1|
        'mismatch_weight': 1,
        'env_ce': 3.5 / 2,
        'env_ce/wrapper': 3,
        'env_ce/output': 0.5,  # and no 'env_ce/feedback': there is none
        'action_tokens': 2,
        'target_tokens': 2,
        'warning_tokens': 0,
        'feedback_tokens': 0,
        'wrapper_tokens': 1,
        'output_tokens': 1,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)


def test_rollout_as_old_is_clipped_by_hand():
    logprobs = jnp.array([[0.0, -1.0, -2.0, -3.0, -0.5, 0.0]])
    config = small_config(old_logprobs='rollout', clip_high=0.28)
    (total, metrics), gradient = loss_and_gradient(logprobs, hand_batch(), config, 0)
    # Ratios exp(0.5) = 1.648721, clipped to 1.28, and exp(-1) = 0.367879, which min leaves (A > 0):
    # -(1.28 x 2 + 0.367879 x 2)/2 = -1.647879. Gradient -0.367879 on the second alone.
    np.testing.assert_allclose(total, -1.647879, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, -0.367879, 0, 0, 0]], rtol=1e-5)
    metrics = finish_metrics(metrics)
    assert metrics['clip_fraction'] == 0.5
    assert metrics['ratio_deviation'] == pytest.approx((0.648721 + 0.632121) / 2, rel=1e-5)
    # r - 1 - log r: 1.648721 - 1 - 0.5 = 0.148721; 0.367879 - 1 + 1 = 0.367879
    assert metrics['approx_kl'] == pytest.approx((0.148721 + 0.367879) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ('mismatch', 'cap', 'weights', 'masked'),
    [
        ('none', 1.5, (1, 1), None),
        ('token', 1.5, (1.5, 0.367879), None),  # min(exp(0.5), 1.5), exp(-1)
        ('sequence', 1.5, (0.606531, 0.606531), None),  # exp(0.5 - 1)
        ('mask', 1.5, (0, 0), 1),  # 1.6487 > 1.5 and 0.3679 < 1/1.5
        ('mask', 1.7, (1, 0), 0.5),  # 1.6487 < 1.7 and 0.3679 < 1/1.7
        ('icepop', 1.7, (1.648721, 0), 0.5),  # the same, and exp(0.5) itself
        ('icepop', 3.0, (1.648721, 0.367879), 0),  # 1/3 < exp(-1)
        # The geometric mean is exp((0.5 - 1) / 2) = 0.7788: between 1/1.5 and 1.5, below 1/1.2.
        ('geometric', 1.5, (1, 1), 0),
        ('geometric', 1.2, (0, 0), 1),
    ],
)
def test_mismatch_by_hand(mismatch, cap, weights, masked):
    logprobs = jnp.array([[0.0, -1.0, -2.0, -3.0, -0.5, 0.0]])
    config = small_config(mismatch=mismatch, mismatch_cap=cap)
    (_, metrics), gradient = loss_and_gradient(logprobs, hand_batch(), config, 0)
    # A constant, so the gradient is -w A/2 = -w.
    np.testing.assert_allclose(gradient[0, 1:3], np.negative(weights), rtol=1e-5)
    metrics = finish_metrics(metrics)
    assert metrics['mismatch_weight'] == pytest.approx(np.mean(weights), rel=1e-5)
    assert metrics.get('mismatch_masked') == masked
    assert metrics['logprob_gap'] == pytest.approx(0.75)  # (0.5 + 1)/2, corrected or not


@pytest.mark.slow
def test_sequence_correction_is_of_each_rollout_in_a_packed_row():
    rollouts = [make_rollout('PAAOAA', reward=1.0), make_rollout('PAOA', sample=1, first_token=11)]
    for r in rollouts:
        r.rollout_logprobs = np.where(r.roles == Role.ACTION, -1.0, 0).astype(np.float32)
    config = small_config(mismatch='sequence', mismatch_cap=10.0, advantages='dr_grpo')
    batch = make_batch(rollouts, config)
    logprobs = jnp.where(batch.segment_ids == 1, -0.9, -1.4)
    gradient = jax.grad(lambda l: echo_loss(l, batch, config, 0)[0])(logprobs)
    # exp(4 x 0.1) and exp(2 x -0.4), A = 1/2 over 2 x 4 and -1/2 over 2 x 2
    np.testing.assert_allclose(gradient[0, 1], -1.491825 / 16, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 7], 0.449329 / 8, rtol=1e-5)


def test_micro_batches_of_unequal_counts_add_up_to_one_mean():
    """3 nats on 1 token and 2 nats on 4 tokens are 1 nat a token, not the mean of 3 and 0.5."""
    parts = [{'env_ce': Metric(3.0, 1.0), 'loss': total(2.0)}]
    parts.append({'env_ce': Metric(2.0, 4.0), 'loss': total(0.5)})
    assert finish_metrics(jax.tree.map(jnp.add, *parts)) == {'env_ce': 1.0, 'loss': 2.5}
    assert finish_metrics({'env_ce': Metric(0.0, 0.0)}) == {}  # a mean over no token
    with pytest.raises(TypeError, match='count'):
        Metric(3.0)  # a mean whose count is forgotten


def test_another_policy_loss_is_one_function():
    """r A without any bound (arXiv 1707.06347, eq. 6)."""

    def unclipped(tokens, bounds):
        return tokens.ratio * tokens.advantages, {'above_one': tokens.ratio > 1.0}

    def loss(logprobs):
        batch, bounds = hand_batch(), Bounds(0.2, 0.28, 3.0, 0.1)
        settings = {'bounds': bounds, 'mismatch': 'none', 'mismatch_cap': 2.0}
        old = batch.rollout_logprobs
        return policy_term(logprobs, old, batch, surrogate=unclipped, **settings)

    logprobs = jnp.array([[jnp.nan, -1.0, -2.0, -3.0, -0.5, jnp.inf]])
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    # Ratios exp(0.5) and exp(-1); A 2, weights 1/2: -(1.648721 + 0.367879), r A's gradient is r A.
    np.testing.assert_allclose(value, -2.0166, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[0, -1.648721, -0.367879, 0, 0, 0]], rtol=1e-5)
    assert finish_metrics(metrics)['above_one'] == 0.5


def test_temperature_one_and_entropy_are_reported():
    logprobs = jnp.array([[0.0, -1.0, -2.0, -3.0, -0.5, 0.0]])
    entropy = jnp.array([[jnp.nan, 0.5, 1.5, 9.0, 9.0, 9.0]])
    total, metrics = echo_loss(
        logprobs, hand_batch(), small_config(), 0.1, logprobs_t1=2 * logprobs, entropy=entropy
    )
    metrics = finish_metrics(metrics)
    assert metrics['env_ce'] == pytest.approx(3.5)  # (6 + 1)/2, the loss as before
    assert total == pytest.approx(-1.9125)
    assert metrics['entropy'] == pytest.approx(1.0)  # (0.5 + 1.5)/2


variants = st.fixed_dictionaries(
    {
        # So that with the tables' ratios every bound acts on some tokens and not on others.
        'policy': st.sampled_from(list(SURROGATES)),
        'clip_low': st.sampled_from([0.2, 0.05]),
        'clip_high': st.sampled_from([0.28, 0.05]),
        'dual_clip': st.just(1.2),
        'dppo_tv': st.just(0.03),
        'mismatch': st.sampled_from(list(CORRECTIONS)),
        'mismatch_cap': st.sampled_from([1.3, 1.05]),
        'old_logprobs': st.sampled_from(['current', 'recomputed', 'rollout']),
        'kl_coef': st.sampled_from([0.0, 0.1]),
        'kl': st.sampled_from(list(KL_ESTIMATORS)),
        'kl_in': st.sampled_from(['loss', 'reward']),
    }
).map(lambda v: v | {'mismatch': 'none'} if v['old_logprobs'] == 'rollout' else v)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    rollouts=rollout_lists(),
    weights=loss_settings,
    variant=variants,
    env_coef=st.sampled_from([0, 0.05, 1.0]),
    pack=st.booleans(),
    seed=st.integers(0, 3),
)
def test_equals_the_objective_however_it_is_packed(
    rollouts, weights, variant, env_coef, pack, seed
):
    """Whole, packed or padded, and as a sum over micro-batches in any order of rows."""
    current, old, frozen = tables(seed)
    for r in rollouts:  # a sampler near the learner, so that masks and clips go either way
        near = current[r.tokens] + 0.2 * np.sin(r.tokens)
        r.rollout_logprobs = np.where(r.roles == Role.ACTION, near, 0).astype(np.float32)
    config = small_config(pack=pack, **weights, **variant)
    expected, expected_gradient = reference(rollouts, config, env_coef, current, old, frozen)
    with jax.enable_x64(True):
        batch = make_batch(rollouts, config)
        (total, metrics), gradient = value_and_grad(current, batch, config, env_coef, old, frozen)
        # Weights are float32: 6e-8 each.
        np.testing.assert_allclose(total, expected, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-6, atol=1e-6)

        # Packed the other way, rows shuffled, cut into micro-batches.
        config.batch.pack = not pack
        rows = np.random.default_rng(seed).permutation(len(batch.tokens))
        other = Batch(*(array[rows] for array in make_batch(rollouts, config)))
        pieces = [Batch(*(array[i : i + 5] for array in other)) for i in (0, 5)]
        parts = [value_and_grad(current, p, config, env_coef, old, frozen) for p in pieces]
        np.testing.assert_allclose(sum(p[0][0] for p in parts), total, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(sum(p[1] for p in parts), gradient, rtol=1e-9, atol=1e-12)
        added = jax.tree.map(lambda *x: sum(x), *[p[0][1] for p in parts])
    assert finish_metrics(added) == pytest.approx(finish_metrics(metrics), rel=1e-5, abs=1e-9)
    assert all(np.isfinite(value) for value in finish_metrics(metrics).values())


@pytest.mark.parametrize('old_logprobs', ['current', 'rollout'])
def test_env_coef_zero_is_grpo_bit_for_bit(old_logprobs):
    """Loss and gradient, through a softmax, against GRPO with no environment term to leave out."""
    config = small_config(old_logprobs=old_logprobs)
    batch = make_batch(example(), config)
    logits = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 64))

    def logprobs_of(scale):
        logprobs = jax.nn.log_softmax(scale * logits)
        return jnp.take_along_axis(logprobs, batch.tokens[..., None], -1)[..., 0]

    def grpo(scale):
        logprobs = logprobs_of(scale)
        acting = batch.policy_weight > 0
        current = jnp.where(acting, logprobs, 0.0)
        old = current if old_logprobs == 'current' else jnp.where(acting, batch.rollout_logprobs, 0)
        ratio = jnp.exp(current - jax.lax.stop_gradient(old))
        a = batch.advantages
        return -jnp.sum(batch.policy_weight * jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a))

    def echo(scale, env_coef):
        return echo_loss(logprobs_of(scale), batch, config, env_coef)[0]

    scale = jnp.linspace(0.5, 2, 64)
    expected = jax.jit(jax.value_and_grad(grpo))(scale)
    static = jax.jit(jax.value_and_grad(lambda s: echo(s, 0)))(scale)
    traced = jax.jit(jax.value_and_grad(echo))(scale, jnp.float32(0))
    other = jax.jit(jax.value_and_grad(echo))(scale, jnp.float32(0.05))
    for got in (static, traced):
        assert got[0] == expected[0]
        np.testing.assert_array_equal(got[1], expected[1])
    assert np.abs(expected[1]).max() > 1e-3
    assert not np.array_equal(other[1], expected[1])


def test_a_ratio_beyond_all_bounds_stays_finite():
    config = small_config(old_logprobs='rollout')
    batch = hand_batch()._replace(
        rollout_logprobs=np.full((1, 6), -1e4, np.float32), advantages=-hand_batch().advantages
    )
    logprobs = jnp.full((1, 6), -1.0)
    (total, metrics), gradient = loss_and_gradient(logprobs, batch, config, 0.05)
    assert np.isfinite(total) and np.isfinite(gradient).all()
    assert all(np.isfinite(value) for value in finish_metrics(metrics).values())


def test_supervised_batch_is_plain_cross_entropy():
    batch = make_supervised_batch(example(), small_config(), (Role.ACTION, Role.OUTPUT))
    current = jnp.asarray(tables()[0])

    def loss(table):
        return cross_entropy(table[batch.tokens], batch, -2 * table[batch.tokens])

    (total, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(current)
    tokens = np.concatenate(
        [r.tokens[np.isin(r.roles, (Role.ACTION, Role.OUTPUT))] for r in example()]
    )
    np.testing.assert_allclose(total, -current[tokens].mean(), rtol=1e-5)
    assert (np.flatnonzero(gradient) == np.sort(tokens)).all()
    values = finish_metrics(metrics)
    assert values == pytest.approx({'loss': float(total), 'entropy': 2 * float(total)}, rel=1e-5)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'old_logprobs': 'older'}, 'loss.old_logprobs'),
        ({'mismatch': 'both'}, 'loss.mismatch'),
        ({'policy': 'ppo'}, 'loss.policy'),
        ({'kl': 'k4'}, 'loss.kl is'),
        ({'mismatch': 'token', 'mismatch_cap': 0.5}, 'at least 1'),
        ({'old_logprobs': 'recomputed'}, 'needs the old_logprobs'),
        ({'kl_coef': 0.1}, 'needs reference_logprobs'),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        echo_loss(jnp.zeros((1, 6)), hand_batch(), small_config(**settings), 0.05)
    with pytest.raises(ValueError, match=r'logprobs are \(1, 5\)'):
        echo_loss(jnp.zeros((1, 5)), hand_batch(), small_config(), 0.05)
