"""Both attentions against softmax written out, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.model.attention import BLOCK, cache_attention, segment_attention

# B, T, N, K, H and the lengths of the segments of a row; what they leave is padding.
CASES = {
    'one token': (2, 1, 2, 1, 2, [1]),
    'less than a block': (3, 13, 4, 2, 4, [5, 1, 4]),
    'one block, no groups': (1, BLOCK, 3, 3, 2, [BLOCK]),
    'one query head a block apart': (2, BLOCK + 1, 1, 1, 6, [2, BLOCK - 2, 1]),
    'a remainder, one key-value head': (1, 2 * BLOCK + 37, 4, 1, 2, [90, 150, 20]),
}
# Tiny programs run often enough without LLVM's optimizations, which take half of their compilation.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True, scope='module')
def float64():
    with jax.enable_x64(True):
        yield


def draw(case, dtype=np.float64):
    B, T, N, K, H, lengths = CASES[case]
    rng = np.random.default_rng(T)
    q, k, v = (rng.normal(0, 1.5, (B, T, heads, H)).astype(dtype) for heads in (N, K, K))
    row = np.repeat(np.arange(len(lengths) + 1), [T - sum(lengths), *lengths])
    row = np.r_[row[row > 0], row[row == 0]]
    # Each row has the segments at other places: padding first, last and in between.
    segments = np.stack([np.roll(row, 3 * b) for b in range(B)]).astype(np.int32)
    return q, k, v, segments


def written_out(q, k, v, segments):
    """A query at a time: softmax over the earlier tokens of its segment."""
    B, T, N, H = q.shape
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        kv_head = n // (N // k.shape[2])
        seen = np.flatnonzero(segments[b, : t + 1] == segments[b, t])
        scores = k[b, seen, kv_head] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, kv_head]
    return out


def plain(q, k, v, segments):
    """The same for jax.grad: whole score matrices and no VJP of its own."""
    T, N, H = q.shape[1:]
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    seen = jnp.tril(jnp.ones((T, T), bool)) & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.where(seen[:, None], jnp.einsum('btnh,bsnh->bnts', q, k) / H**0.5, -jnp.inf)
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores, axis=-1), v)


@functools.partial(jit, static_argnums=0)
def with_gradients(attend, q, k, v, segments, cotangent):
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
    return out, pull(cotangent.astype(out.dtype))


def test_two_tokens_by_hand():
    """Scores 2 * 3 / sqrt(4) = 3 and 2 * 1 / 2 = 1: weights 1 / (1 + e^-2) and the rest."""
    q = jnp.zeros((1, 2, 1, 4)).at[0, 1, 0, 0].set(2.0)
    k = jnp.zeros((1, 2, 1, 4)).at[0, :, 0, 0].set(jnp.array([3.0, 1.0]))
    v = jnp.zeros((1, 2, 1, 4)).at[0, :, 0, 0].set(jnp.array([10.0, 20.0]))
    first = 1 / (1 + np.exp(-2.0))
    attend = jit(segment_attention)
    together = attend(q, k, v, jnp.array([[1, 1]]))[0, :, 0, 0]
    np.testing.assert_allclose(together, [10.0, 10 * first + 20 * (1 - first)], rtol=1e-12)
    apart = attend(q, k, v, jnp.array([[1, 2]]))[0, :, 0, 0]
    np.testing.assert_allclose(apart, [10.0, 20.0], rtol=1e-12)


@pytest.mark.parametrize('case', CASES)
def test_values_and_gradients(case):
    q, k, v, segments = draw(case)
    cotangent = np.random.default_rng(1).normal(size=q.shape)
    ours, grads = with_gradients(segment_attention, q, k, v, segments, cotangent)
    np.testing.assert_allclose(ours, written_out(q, k, v, segments), rtol=1e-9, atol=1e-11)
    theirs, plain_grads = with_gradients(plain, q, k, v, segments, cotangent)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    for name, grad, expected in zip('qkv', grads, plain_grads):
        np.testing.assert_allclose(grad, expected, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-5), (jnp.bfloat16, 4e-2)])
def test_lower_precision_keeps_its_dtype_and_the_value(dtype, tolerance):
    q, k, v, segments = draw('one query head a block apart')
    low = [jnp.asarray(x, dtype) for x in (q, k, v)]
    wide = [np.asarray(x, np.float64) for x in low]
    out, grads = with_gradients(segment_attention, *low, segments, np.ones(q.shape))
    exact, exact_grads = with_gradients(plain, *wide, segments, np.ones(q.shape))
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=tolerance)
    for grad, expected in zip(grads, exact_grads):
        assert grad.dtype == dtype
        np.testing.assert_allclose(np.asarray(grad, np.float64), expected, atol=10 * tolerance)


def test_a_segment_knows_nothing_of_its_neighbours():
    q, k, v, segments = draw('less than a block')
    attend = jit(segment_attention)
    before = attend(q, k, v, segments)
    foreign = (segments != 2)[..., None, None]
    after = attend(q, k + 9.0 * foreign, v - 7.0 * foreign, segments)
    inside = segments == 2
    np.testing.assert_array_equal(np.asarray(after)[inside], np.asarray(before)[inside])
    assert (np.abs(after - before)[segments == 1] > 0.1).any()


@pytest.mark.parametrize('start', [0, 5])
def test_over_a_cache_it_is_the_same_attention(start):
    """The queries from `start` on; what lies behind the last token in the cache is not seen."""
    q, k, v, _ = draw('less than a block')
    B, T = q.shape[:2]
    whole = jit(segment_attention)(q, k, v, jnp.ones((B, T), jnp.int32))
    rest = ((0, 0), (0, 0), (0, 6), (0, 0))
    keys, values = (np.pad(x.transpose(0, 2, 1, 3), rest, constant_values=1e4) for x in (k, v))
    positions = jnp.tile(jnp.arange(start, T), (B, 1))
    out = jit(cache_attention)(q[:, start:], keys, values, positions)
    np.testing.assert_allclose(out, whole[:, start:], rtol=1e-9, atol=1e-11)


def test_every_row_of_a_cache_has_its_own_length():
    q, k, v, _ = draw('less than a block')
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    lengths = np.array([2, 12, 7])
    last = np.take_along_axis(q, lengths[:, None, None, None], axis=1)
    out = jit(cache_attention)(last, keys, values, lengths[:, None])
    for b, length in enumerate(lengths):
        row = np.s_[b : b + 1, : length + 1]
        whole = written_out(q[row], k[row], v[row], np.ones((1, length + 1)))
        np.testing.assert_allclose(out[b, 0], whole[0, -1], rtol=1e-9)
