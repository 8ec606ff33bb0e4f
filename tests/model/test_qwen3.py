"""The model against Qwen3 written out in NumPy, a head and a sequence at a time, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from echo_jax.model.attention import BLOCK
from echo_jax.model.logprobs import token_logprobs
from echo_jax.model.qwen3 import Qwen3, Qwen3Config, rms_norm
from echo_jax.model.rope import rope

# No two axes are alike, so none can stand in for another; head_dim is not D / N, as in Qwen3.
CONFIG = Qwen3Config(
    vocab_size=23,
    hidden_size=10,
    intermediate_size=14,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=50.0,
    initializer_range=0.4,
    dtype='float64',
)
# Tiny programs run often enough without LLVM's optimizations, which take half of their compilation.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


def build(**changes):
    """(graphdef, params), norms too at random: a scale of 1 would hide one left out."""
    config = dataclasses.replace(CONFIG, **changes)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: rng.normal(0.2, 0.4, x.shape), params)


@functools.partial(jit, static_argnums=0)
def hidden_states(graphdef, params, tokens, positions, segments):
    return nnx.merge(graphdef, params)(tokens, positions, segments)


@functools.partial(jit, static_argnums=0)
def extended(graphdef, params, tokens, positions, cache):
    return nnx.merge(graphdef, params).extend(tokens, positions, cache)


def draw(length, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).astype(np.int32)


def written_out(params, tokens, config=CONFIG):
    """(hidden states [T, D], logits [T, V]) of one sequence."""
    p = nnx.to_pure_dict(jax.tree.map(np.asarray, params))
    H, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    T = len(tokens)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.rms_norm_eps) * scale

    def rotate(x):
        """Pairs (i, i + H/2), as complex numbers, turned by t * theta^(-2i/H)."""
        pairs = x[:, : H // 2] + 1j * x[:, H // 2 :]
        speed = config.rope_theta ** (-2 * np.arange(H // 2) / H)
        turned = pairs * np.exp(1j * np.outer(np.arange(T), speed))
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def head(h, layer, n):
        mine, shared = (
            np.s_[:, n * H : (n + 1) * H],
            np.s_[:, n // group * H : (n // group + 1) * H],
        )
        q = rotate(norm(h @ layer['wq'][mine], layer['q_norm']))
        k = rotate(norm(h @ layer['wk'][shared], layer['k_norm']))
        scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ (h @ layer['wv'][shared])

    x = p['embedding'][tokens]
    for i in range(config.num_hidden_layers):
        layer = {name: value[i] for name, value in p['layers'].items()}
        h = norm(x, layer['attention_norm'])
        heads = [head(h, layer, n) for n in range(config.num_attention_heads)]
        x = x + np.concatenate(heads, axis=-1) @ layer['wo']
        h = norm(x, layer['mlp_norm'])
        gate = h @ layer['w_gate']
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer['w_up'])) @ layer['w_down']
    hidden = norm(x, p['final_norm'])
    return hidden, hidden @ p['embedding' if config.tie_word_embeddings else 'head'].T


def alone(length, rows=1):
    """(positions, segment ids) of rows that hold one sequence each."""
    return np.tile(np.arange(length), (rows, 1)), np.ones((rows, length), np.int32)


def test_rms_norm_by_hand():
    """Mean square of (3, 4) is 12.5, of (0, 0) it is eps alone."""
    normed = rms_norm(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([1.0, 10.0]), 1e-6)
    root = np.sqrt(12.5 + 1e-6)
    np.testing.assert_allclose(normed, [[3 / root, 40 / root], [0, 0]], rtol=1e-12)


def test_rope_by_hand():
    """H = 4: at position p the pair (0, 2) turns by p radians, the pair (1, 3) by p / 10."""
    x = jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = rope(x, jnp.array([[3]]), np.array([1, 0.1]))[0, 0, 0]
    np.testing.assert_allclose(turned, [np.cos(3), np.cos(0.3), np.sin(3), np.sin(0.3)], rtol=1e-12)


def test_rope_of_bfloat16_tells_257_from_256():
    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    turned = np.asarray(rope(x, jnp.array([[256, 257]]), np.ones(1)), np.float64)[0, :, 0, 0]
    expected = [np.cos(p) - np.sin(p) for p in (256, 257)]
    np.testing.assert_allclose(turned, expected, atol=0.01)


@pytest.mark.parametrize('tied', [True, False])
def test_hidden_states_and_logprobs_are_those_of_qwen3(tied):
    graphdef, params = build(tie_word_embeddings=tied)
    tokens = draw(12)
    hidden = hidden_states(graphdef, params, tokens[None], *alone(12))
    expected, logits = written_out(params, tokens, nnx.merge(graphdef, params).config)
    np.testing.assert_allclose(hidden[0], expected, rtol=1e-9, atol=1e-11)
    head = nnx.merge(graphdef, params).unembedding
    logp, _ = jit(token_logprobs)(hidden[0, :-1], head, tokens[1:])
    logits = logits[:-1] - logits[:-1].max(-1, keepdims=True)
    picked = logits[np.arange(11), tokens[1:]] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(logp, picked, rtol=1e-9)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 0.15)])
def test_lower_precision_computes_the_same(dtype, tolerance):
    graphdef, params = build(dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    tokens = draw(12)
    hidden = hidden_states(graphdef, params, tokens[None], *alone(12))
    assert hidden.dtype == dtype
    expected, _ = written_out(params, tokens)
    np.testing.assert_allclose(np.asarray(hidden[0], np.float64), expected, atol=tolerance)


def test_two_sequences_in_a_row_are_what_each_is_alone():
    """The second one starts in one block of the attention and ends in the next."""
    graphdef, params = build()
    first, second = draw(BLOCK - 9, seed=1), draw(24, seed=2)
    row = np.concatenate([first, second, np.zeros(5, np.int32)])
    positions = np.r_[np.arange(len(first)), np.arange(24), np.zeros(5, int)]
    segments = np.repeat([1, 2, 0], [len(first), 24, 5])
    hidden = hidden_states(graphdef, params, row[None], positions[None], segments[None])[0]
    ends = len(first), len(first) + 24
    for part, tokens in zip(np.split(hidden, ends), (first, second)):
        np.testing.assert_allclose(part, written_out(params, tokens)[0], rtol=1e-9, atol=1e-10)
    assert np.isfinite(hidden).all()  # padding too


@pytest.mark.parametrize('pieces', [[1] * 12, [5, 1, 1, 5]])
def test_extending_a_cache_is_the_whole_pass(pieces):
    graphdef, params = build()
    rows = np.stack([draw(12, seed=3), draw(12, seed=4)])
    # The second row is two tokens ahead: its first two are in the cache to begin with.
    ahead = np.array([0, 2])
    cache = CONFIG.init_cache(2, 16)
    _, cache = extended(graphdef, params, rows[:, :2], np.tile(np.arange(2), (2, 1)), cache)
    done, hidden = 0, []
    longer = np.concatenate([rows, draw((2, 2), seed=5)], axis=1)
    for size in pieces:
        at = ahead[:, None] + done + np.arange(size)
        tokens = np.take_along_axis(longer, at, axis=1)
        out, cache = extended(graphdef, params, tokens, at, cache)
        hidden.append(out)
        done += size
    hidden = np.concatenate(hidden, axis=1)
    np.testing.assert_allclose(hidden[0], written_out(params, longer[0, :12])[0], rtol=1e-9)
    np.testing.assert_allclose(hidden[1], written_out(params, longer[1])[0][2:], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['full', 'attention', 'offload'])
def test_computing_layers_again_changes_no_gradient(remat):
    def value_and_grads(remat):
        graphdef, params = build(remat=remat)
        row = draw((2, 9)), *alone(9, rows=2)
        return jit(jax.value_and_grad(lambda p: (nnx.merge(graphdef, p)(*row) ** 3).sum()))(params)

    kept, again = value_and_grads('none'), value_and_grads(remat)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(kept))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), kept, again)


def test_every_parameter_names_its_axes():
    _, params = build(tie_word_embeddings=False)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    variables = jax.tree.leaves(params, is_leaf=is_variable)
    assert len(variables) == 14
    sizes = {'layers': 2, 'vocab': 23, 'embed': 10, 'mlp': 14, 'heads': 24, 'kv_heads': 8}
    sizes['head_dim'] = 4
    for variable in variables:
        assert variable.shape == tuple(sizes[axis] for axis in variable.get_metadata()['axes'])


def test_impossible_sizes_say_what_to_change():
    with pytest.raises(ValueError, match='num_attention_heads=6 is no multiple of'):
        dataclasses.replace(CONFIG, num_key_value_heads=4)
    with pytest.raises(ValueError, match='head_dim=5 is odd'):
        dataclasses.replace(CONFIG, head_dim=5)
