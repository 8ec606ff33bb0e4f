"""token_logprobs against log_softmax over whole logits, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.model import logprobs
from echo_jax.model.logprobs import score_tokens, token_logprobs

V, D = 11, 5
# Blocks are of 4 words, so the third has 1 that is not in the second, and of 6 tokens.
# Tokens: one, within a block, three blocks, and blocks of which the last is padded.
SHAPES = [(1,), (5,), (2, 9), (3, 17)]
# Tiny programs run often enough without LLVM's optimizations, which take half of their compilation.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, params=['small blocks', 'one block'])
def block_size(request, monkeypatch):
    if request.param == 'small blocks':
        monkeypatch.setattr(logprobs, 'MAX_WORDS', 4)
        monkeypatch.setattr(logprobs, 'MAX_LOGITS', 24)
    with_gradients.clear_cache()
    jit_score.clear_cache()


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


@functools.partial(jit, static_argnums=(0, 4))
def with_gradients(f, hidden, unembedding, targets, temperature, cotangent):
    out, pull = jax.vjp(lambda h, u: f(h, u, targets, temperature), hidden, unembedding)
    return out, pull(cotangent)


jit_score = jit(score_tokens, static_argnums=3)


def test_by_hand():
    """Logits 2 ln 2 and 0, at temperature 2: ln 2 and 0, so probabilities 2/3 and 1/3."""
    hidden, unembedding = jnp.array([[[2.0], [2.0]]]), jnp.array([[jnp.log(2.0)], [0.0]])
    [logp], [entropy], [logp_t1] = jit_score(hidden, unembedding, jnp.array([[0, 1]]), 2.0)
    np.testing.assert_allclose(logp, np.log([2 / 3, 1 / 3]), rtol=1e-12)
    np.testing.assert_allclose(logp_t1, np.log([4 / 5, 1 / 5]), rtol=1e-12)
    expected = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(entropy, [expected] * 2, rtol=1e-12)


@pytest.mark.parametrize('shape, temperature', [*zip(SHAPES, [1.0, 0.6] * 2), ((2, 9), 1.0)])
def test_values_and_gradients(shape, temperature):
    hidden, unembedding, targets = draw(shape)
    at = hidden, unembedding, targets, temperature
    cotangent = np.random.default_rng(2).normal(size=shape)
    ours, grads = with_gradients(token_logprobs, *at, (cotangent, np.zeros(shape)))
    for value, expected in zip(ours, written_out(*at)):
        assert value.shape == shape
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-12)
    _, plain_grads = with_gradients(plain, *at, cotangent)
    for name, grad, expected in zip(('hidden', 'unembedding'), grads, plain_grads):
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-11, err_msg=name)


def test_entropy_is_a_measurement_and_passes_no_gradient():
    hidden, unembedding, targets = draw((2, 9))
    cotangent = np.zeros((2, 9)), np.ones((2, 9))
    _, grads = with_gradients(token_logprobs, hidden, unembedding, targets, 1.0, cotangent)
    for grad in grads:
        assert not np.any(grad)


def test_extreme_logits_stay_finite():
    hidden, unembedding, targets = draw((2, 9), scale=1e4)
    cotangent = np.ones((2, 9)), np.zeros((2, 9))
    (logp, entropy), grads = with_gradients(
        token_logprobs, hidden, unembedding, targets, 1.0, cotangent
    )
    expected, _ = written_out(hidden, unembedding, targets, 1.0)
    np.testing.assert_allclose(logp, expected, rtol=1e-9, atol=1e-9)
    assert np.asarray(logp).min() < -1e4 and np.isfinite(logp).all()
    assert np.isfinite(entropy).all() and all(np.isfinite(grad).all() for grad in grads)


def test_bfloat16_states_are_summed_in_float32():
    """The head is rounded to the dtype of the states, as in sampling; sums and results are not."""
    hidden, unembedding, targets = draw((2, 9))
    low, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(unembedding, jnp.float32)
    cotangent = np.ones((2, 9), np.float32), np.zeros((2, 9), np.float32)
    (logp, entropy), grads = with_gradients(token_logprobs, low, head, targets, 0.7, cotangent)
    assert logp.dtype == entropy.dtype == grads[1].dtype == jnp.float32
    assert grads[0].dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (low, head.astype(jnp.bfloat16))]
    for value, expected in zip((logp, entropy), written_out(*wide, targets, 0.7)):
        np.testing.assert_allclose(value, expected, atol=1e-5)
    _, plain_grads = with_gradients(plain, *wide, targets, 0.7, np.ones((2, 9)))
    for grad, expected in zip(grads, plain_grads):
        np.testing.assert_allclose(np.asarray(grad, np.float64), expected, atol=0.05)


def test_the_temperature_of_the_sampler_and_temperature_1_in_one_pass():
    hidden, unembedding, targets = draw((2, 9))
    both = jit_score(hidden, unembedding, targets, 0.6)
    for ours, temperature in ((both.logprobs, 0.6), (both.logprobs_t1, 1.0)):
        expected, _ = written_out(hidden, unembedding, targets, temperature)
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


def temporaries(T, V, D):
    """GiB that the compiled value and gradients need beyond inputs and outputs, in float32."""
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, T, D), (V, D)))
    targets = jax.ShapeDtypeStruct((1, T), jnp.int32)
    loss = lambda h, u, t: score_tokens(h, u, t, 0.8).logprobs.sum()  # noqa: E731
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes, targets).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**30


@pytest.mark.slow
def test_memory_does_not_grow_with_tokens_times_words(request):
    if 'small' in request.node.name:
        pytest.skip('the sizes of a real model need real blocks')
    # Whole logits take 9.3 GiB. XLA's CPU compiler widens bfloat16 arrays; see tests/planner.
    assert 0.1 < temporaries(16_384, 151_936, 4_096) < 1.5
    assert temporaries(8_192, 32_768, 64) < 10 * temporaries(1_024, 4_096, 64)
