"""token_logprobs against log_softmax over whole logits, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.model import logprobs
from echo_jax.model.logprobs import BLOCK, token_logprobs

V, D = 11, 5
# Tokens: one, within a block, two rows, exactly two blocks, and a block with a remainder.
SHAPES = [(1,), (7,), (2, 9), (2, BLOCK), (BLOCK + 3,)]


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


def draw(shape, scale=1.0):
    rng = np.random.default_rng(len(shape) + shape[-1])
    hidden, unembedding = rng.normal(0, scale, (*shape, D)), rng.normal(size=(V, D))
    return hidden, unembedding, rng.integers(0, V, shape).astype(np.int32)


def written_out(hidden, unembedding, targets, temperature):
    """(log-probabilities, entropies) in NumPy."""
    logits = hidden @ unembedding.T / temperature
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return picked, -(np.exp(logp) * logp).sum(-1)


def plain(hidden, unembedding, targets, temperature):
    logp = jax.nn.log_softmax(hidden @ unembedding.T / temperature)
    return jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]


def test_by_hand():
    """Logits 2 ln 2 and 0, at temperature 2: ln 2 and 0, so probabilities 2/3 and 1/3."""
    hidden, unembedding = jnp.array([[2.0], [2.0]]), jnp.array([[jnp.log(2.0)], [0.0]])
    logp, entropy = token_logprobs(hidden, unembedding, jnp.array([0, 1]), 2.0)
    np.testing.assert_allclose(logp, np.log([2 / 3, 1 / 3]), rtol=1e-12)
    expected = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(entropy, [expected] * 2, rtol=1e-12)


@pytest.mark.parametrize('temperature', [1.0, 0.6])
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients(shape, temperature):
    hidden, unembedding, targets = draw(shape)
    ours, pull = jax.vjp(
        lambda h, u: token_logprobs(h, u, targets, temperature), hidden, unembedding
    )
    for value, expected in zip(ours, written_out(hidden, unembedding, targets, temperature)):
        assert value.shape == shape
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    _, pull_plain = jax.vjp(lambda h, u: plain(h, u, targets, temperature), hidden, unembedding)
    cotangent = np.random.default_rng(2).normal(size=shape)
    grads = pull((cotangent, jnp.zeros(shape)))
    for name, grad, expected in zip(('hidden', 'unembedding'), grads, pull_plain(cotangent)):
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-11, err_msg=name)


def test_entropy_is_a_measurement_and_passes_no_gradient():
    hidden, unembedding, targets = draw((7,))
    _, pull = jax.vjp(lambda h, u: token_logprobs(h, u, targets, 1.0), hidden, unembedding)
    for grad in pull((jnp.zeros(7), jnp.ones(7))):
        assert not np.any(grad)


def test_extreme_logits_stay_finite():
    hidden, unembedding, targets = draw((7,), scale=1e4)
    grads = jax.grad(lambda h: token_logprobs(h, unembedding, targets)[0].sum())(hidden)
    logp, entropy = token_logprobs(hidden, unembedding, targets)
    expected, _ = written_out(hidden, unembedding, targets, 1.0)
    np.testing.assert_allclose(logp, expected, rtol=1e-9, atol=1e-9)
    assert np.isfinite(grads).all() and (np.asarray(entropy) > -1e-9).all()
    assert np.asarray(logp).min() < -1e4


def test_bfloat16_states_are_summed_in_float32():
    """The head is rounded to the dtype of the states, as in sampling; sums and results are not."""
    hidden, unembedding, targets = draw((2, 9))
    low = jnp.asarray(hidden, jnp.bfloat16)
    head = jnp.asarray(unembedding, jnp.float32)
    (logp, entropy), pull = jax.vjp(lambda h, u: token_logprobs(h, u, targets, 0.7), low, head)
    assert logp.dtype == entropy.dtype == jnp.float32
    rounded = low.astype(np.float64), head.astype(jnp.bfloat16).astype(np.float64)
    for value, expected in zip(
        (logp, entropy), written_out(*map(np.asarray, rounded), targets, 0.7)
    ):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    _, pull_plain = jax.vjp(lambda h, u: plain(h, u, targets, 0.7), *rounded)
    grads = pull((jnp.ones((2, 9), jnp.float32), jnp.zeros((2, 9), jnp.float32)))
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for grad, expected in zip(grads, pull_plain(jnp.ones((2, 9)))):
        np.testing.assert_allclose(grad.astype(np.float64), expected, atol=0.05)


def test_whole_logits_never_exist():
    size = 3 * BLOCK
    shapes = (
        jax.ShapeDtypeStruct((size, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
    )
    targets = jnp.zeros(size, jnp.int32)
    loss = lambda h, u: token_logprobs(h, u, targets)[0].sum()  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes))
    assert f'f32[{BLOCK},{V}]' in program
    assert f'[{size},{V}]' not in program and f'[3,{BLOCK},{V}]' not in program


def test_the_block_size_changes_nothing(monkeypatch):
    hidden, unembedding, targets = draw((2, 9))
    loss = lambda h, u: (token_logprobs(h, u, targets, 0.9)[0] ** 2).sum()  # noqa: E731
    whole = jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembedding)
    monkeypatch.setattr(logprobs, 'BLOCK', 4)
    blocks = jax.value_and_grad(loss, argnums=(0, 1))(hidden, unembedding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), whole, blocks)
