import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.learner.kl import KL_ESTIMATORS, reward_less_kl
from echo_jax.learner.losses import echo_loss, finish_metrics
from tests.support.hand_losses import hand_batch
from tests.support.random_rollouts import small_config

# The two actions have log p = -1 and -2, and log q = -1.2 and -1.5: x = -0.2 and 0.5.
LOGPROBS = [[jnp.nan, -1.0, -2.0, -3.0, -0.5, jnp.inf]]
REFERENCE = [[jnp.inf, -1.2, -1.5, jnp.nan, -9.0, jnp.nan]]
BY_HAND = {
    # -x, and its slope by log p, 1, which does not depend on x.
    'k1': ((0.2, -0.5), (1, 1)),
    # x^2 / 2, and -x.
    'k2': ((0.02, 0.125), (0.2, -0.5)),
    # exp(x) - 1 - x: 0.818731 - 0.8, 1.648721 - 1.5; and 1 - exp(x).
    'k3': ((0.018731, 0.148721), (0.181269, -0.648721)),
}


@pytest.mark.parametrize('kl', KL_ESTIMATORS)
@pytest.mark.parametrize('kl_in', ['loss', 'reward'])
def test_by_hand(kl, kl_in):
    config = small_config(kl=kl, kl_coef=0.1, kl_in=kl_in)
    reference = jnp.array(REFERENCE)

    def loss(logprobs):
        batch = hand_batch()._replace(advantages=np.zeros((1, 6), np.float32))
        return echo_loss(logprobs, batch, config, 0, reference_logprobs=reference)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.array(LOGPROBS))
    estimates, slopes = BY_HAND[kl]
    # The weights are 1/2 and the coefficient 1/10. In the reward, nothing is added to the loss.
    scale = 0.1 if kl_in == 'loss' else 0.0
    np.testing.assert_allclose(value, scale * sum(estimates) / 2, rtol=1e-4)
    expected = [[0, *(scale * slope / 2 for slope in slopes), 0, 0, 0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    # It is measured in both cases.
    metrics = finish_metrics(metrics)
    assert metrics['kl_loss'] == pytest.approx(sum(estimates) / 2, rel=1e-4)
    assert metrics['reference_kl'] == pytest.approx(sum(estimates) / 2, rel=1e-4)


def test_in_the_reward_the_frozen_model_is_not_needed_by_the_loss():
    config = small_config(kl_coef=0.1, kl_in='reward')
    value, metrics = echo_loss(jnp.zeros((1, 6)), hand_batch(), config, 0)
    np.testing.assert_allclose(value, -2)  # the ratios are 1, A is 2
    assert 'kl_loss' not in metrics


@pytest.mark.parametrize('kl', KL_ESTIMATORS)
def test_reward_less_kl_by_hand(kl):
    # The rollout of above, one without an action, and one of a single action with x = 0.
    logprobs = np.array([*LOGPROBS, [np.nan] * 6, [0, -0.7, *[np.nan] * 4]])
    reference = np.array([*REFERENCE, [np.inf] * 6, [0, -0.7, *[np.nan] * 4]])
    acting = np.zeros((3, 6), bool)
    acting[0, 1:3] = acting[2, 1] = True
    found = [
        reward_less_kl(reward, *arrays, kl=kl, kl_coef=0.1)
        for reward, *arrays in zip([1.0, 0.5, -0.25], logprobs, reference, acting)
    ]
    # Summed over the tokens, not their mean: 1 - 0.1 (0.2 - 0.5) for k1.
    np.testing.assert_allclose(found, [1 - 0.1 * sum(BY_HAND[kl][0]), 0.5, -0.25], rtol=1e-5)
    none = np.zeros(0)
    assert reward_less_kl(0.5, none, none, none > 0, kl=kl, kl_coef=0.1) == 0.5


@pytest.mark.parametrize('kl', KL_ESTIMATORS)
def test_host_and_step_have_the_same_estimate(kl):
    x = np.linspace(-3, 3, 13)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            KL_ESTIMATORS[kl](x, np), KL_ESTIMATORS[kl](jnp.asarray(x), jnp), rtol=1e-12
        )


def test_which_estimates_have_the_divergences_gradient():
    """Of a policy over three tokens, in expectation: k1 as a loss has none, k2 has the KL's."""
    logits, frozen = jnp.array([0.3, -0.5, 0.1]), jnp.array([0.1, 0.2, 0.7])

    def divergence(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - jnp.log(frozen)))

    def expected(kl):
        p = jax.nn.softmax(logits)

        def loss(logits):  # sampled from p, which is held
            return jnp.sum(p * KL_ESTIMATORS[kl](jnp.log(frozen) - jax.nn.log_softmax(logits), jnp))

        return jax.grad(loss)(logits)

    true = jax.grad(divergence)(logits)
    assert np.abs(true).max() > 0.1
    np.testing.assert_allclose(expected('k1'), 0, atol=1e-6)
    np.testing.assert_allclose(expected('k2'), true, rtol=1e-5)
    assert np.abs(expected('k3') - true).max() > 0.01  # GRPO's is of another divergence
