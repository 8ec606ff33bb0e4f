"""Causal attention within segments, for training, and over a key-value cache, for sampling.

B rows, T tokens, S keys, N query heads, K key-value heads, G = N // K, H head dimension; P pairs of
a row and a key-value head; t queries of one block or of one device.

Training never holds [T, T] scores. Accelerators have kernels of their own (flash.py). On a CPU, XLA
runs plain two-dimensional products at over 100 GFLOP/s and batched ones at 10 to 40. So the blocks
here walk the pairs P one at a time, fold a head's G queries into the query length, and skip the
keys that causality hides. Their VJP keeps the output and the log-sum-exp and computes the
probabilities again. experiments/benchmarks/attention.py measures this.

On a mesh every device computes the attention of its own rows, heads and queries to the keys of
whole rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from echo_jax.model import partition
from echo_jax.model.axes import ATTENTION, QUERIES
from echo_jax.model.precision import sum_dtype

KINDS = ('auto', 'splash', 'cudnn', 'pallas', 'blocks')
BLOCK = 128  # queries of one product; keys come in multiples of it
HIDDEN = -1e30  # a masked score; finite, because a row of -inf would be NaN after its softmax


class Cache(NamedTuple):
    """Keys and values of the tokens so far, an array for each layer: so they update in place."""

    keys: tuple[jax.Array, ...]  # one [B, K, S, H] for each layer
    values: tuple[jax.Array, ...]  # likewise


def segment_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    kind: str = 'auto',
) -> jax.Array:
    """Softmax attention of every token over the tokens of its own segment up to itself.

    Scores are scaled by H ** -0.5. Returns [B, T, N, H] in the dtype of the queries. Padding
    (segment 0) attends to padding; the result is finite, and no weight is ever on it.

    kind: 'auto' takes the platform's: 'splash' on TPU, 'pallas' on CUDA, else 'blocks', which run
        everywhere. 'cudnn' is faster than 'pallas', and right only if a row holds one segment, from
        its start, and padding after it. Raises ValueError for another kind, and if 'pallas' or
        'cudnn' would have to split the tokens of a row.
    """
    if kind == 'auto':
        kind = {'tpu': 'splash', 'gpu': 'pallas', 'cuda': 'pallas'}.get(
            partition.platform(), 'blocks'
        )
    if kind not in KINDS:
        raise ValueError(f'model.attention is {kind!r}; expected one of {KINDS}')
    if kind == 'blocks':
        attend = _blocks
    else:
        from echo_jax.model import flash  # takes half a second, and no CPU ever runs it

        if kind == 'splash':
            return flash.splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        if partition.size('tokens') > 1:
            raise ValueError(
                f'model.attention={kind!r} does not split the tokens of a row; set mesh.context=1, '
                "or model.attention='blocks'"
            )
        attend = {'pallas': flash.pallas, 'cudnn': flash.cudnn}[kind]
    call = partition.per_device(attend, ATTENTION, QUERIES)
    return call(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, segment_ids_BT)


# ---------------------------------------------------------------------------- training, on a CPU


def _blocks(q_BtNH, k_BSKH, v_BSKH, segments_Bt, segments_BS):
    """What one device computes."""
    B, t, N, H = q_BtNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q_PGtH = q_BtNH.reshape(B, t, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, t, H)
    k_PSH, v_PSH = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k_BSKH, v_BSKH))
    segments = (jnp.repeat(x, K, axis=0) for x in (segments_Bt, segments_BS))
    # If the tokens of a row are split over devices, this device's queries begin somewhere in it.
    # Taking them for the first ones would hide keys that they may see.
    split = partition.mesh_axes('tokens')
    first = jax.lax.axis_index(split) * t if split else None
    out_PGtH = _attend(q_PGtH, k_PSH, v_PSH, *segments, first)
    return out_PGtH.reshape(B, K, G, t, H).transpose(0, 3, 1, 2, 4).reshape(B, t, N, H)


def _bounds(t: int, S: int, first) -> list[tuple[int, int, int]]:
    """(start, stop, seen) of each block: its queries [start, stop) and the keys [0, seen)."""
    blocks = [(start, min(start + BLOCK, t)) for start in range(0, t, BLOCK)]
    # `first` is known only when the step runs, but the size of a product must be known before. So
    # on split rows every block is multiplied with all keys, and the mask alone hides the later.
    return [(start, stop, stop if first is None else S) for start, stop in blocks]


def _scores(q_GtH, k_SH, segments_t, segments_S, block, first):
    """Masked, scaled scores [G, queries, keys] of one block of `_bounds`, in `sum_dtype`."""
    start, stop, seen = block
    (G, _, H), queries = q_GtH.shape, stop - start
    q_XH = q_GtH[:, start:stop].reshape(G * queries, H)
    # bfloat16 scores would be off by up to 2 ** -9 of their size, and their exponentials with them.
    scores = jnp.dot(q_XH, k_SH[:seen].T, preferred_element_type=sum_dtype(q_GtH))
    position = start + (0 if first is None else first)
    mask = position + jnp.arange(queries)[:, None] >= jnp.arange(seen)[None, :]
    mask &= segments_t[start:stop, None] == segments_S[None, :seen]
    return jnp.where(mask, scores.reshape(G, queries, seen) * H**-0.5, HIDDEN)


@jax.custom_vjp
def _attend(q_PGtH, k_PSH, v_PSH, q_segments_Pt, segments_PS, first):
    """[P, G, t, H]; `first` is the queries' first position, or None if they are a row's first."""
    return _attend_forward(q_PGtH, k_PSH, v_PSH, q_segments_Pt, segments_PS, first)[0]


def _attend_forward(q_PGtH, k_PSH, v_PSH, q_segments_Pt, segments_PS, first):
    def one_head(args):
        q_GtH, k_SH, v_SH, q_segments, segments = args
        G, t, H = q_GtH.shape
        out, lse = [], []
        for block in _bounds(t, k_SH.shape[0], first):
            start, stop, seen = block
            scores = _scores(q_GtH, k_SH, q_segments, segments, block, first)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            mixed = jnp.dot(weights.astype(v_SH.dtype).reshape(-1, seen), v_SH[:seen])
            # Divided after the product: t * H divisions instead of t * seen.
            out.append((mixed.reshape(G, stop - start, H) / total).astype(q_GtH.dtype))
            lse.append((top + jnp.log(total))[..., 0])
        return jnp.concatenate(out, 1), jnp.concatenate(lse, 1)

    inputs = q_PGtH, k_PSH, v_PSH, q_segments_Pt, segments_PS
    # `map`, because `vmap` would make batched products of these.
    out_PGtH, lse_PGt = jax.lax.map(one_head, inputs)
    return out_PGtH, (inputs, first, out_PGtH, lse_PGt)


def _attend_backward(residuals, d_out_PGtH):
    inputs, first, out_PGtH, lse_PGt = residuals

    def one_head(args):
        (q_GtH, k_SH, v_SH, q_segments, segments), out_GtH, lse_Gt, d_out_GtH = args
        (_, t, H), S = q_GtH.shape, k_SH.shape[0]
        # Every block of queries adds to the gradients of the same keys and values. In bfloat16,
        # which has 8 bits, the later and smaller of those additions would be lost.
        wide = sum_dtype(q_GtH)
        d_q, d_k, d_v = [], jnp.zeros((S, H), wide), jnp.zeros((S, H), wide)
        for block in _bounds(t, S, first):
            start, stop, seen = block
            q, d_out = q_GtH[:, start:stop], d_out_GtH[:, start:stop]
            scores = _scores(q_GtH, k_SH, q_segments, segments, block, first)
            weights = jnp.exp(scores - lse_Gt[:, start:stop, None])
            # Softmax's derivative needs sum(weights * d_weights) of each query. That is also
            # sum(out * d_out), which has H terms and needs no second pass over the keys.
            inner = (d_out.astype(wide) * out_GtH[:, start:stop]).sum(-1, keepdims=True)
            d_out = d_out.reshape(-1, H)
            d_weights = jnp.dot(d_out, v_SH[:seen].T, preferred_element_type=wide)
            d_scores = weights * (d_weights.reshape(weights.shape) - inner) * H**-0.5
            d_scores = d_scores.reshape(-1, seen).astype(q.dtype)
            weights = weights.reshape(-1, seen).astype(q.dtype)
            d_q.append(jnp.dot(d_scores, k_SH[:seen]).reshape(q.shape))
            # The rows of a product are all G heads' queries, so this sums over the group too.
            d_k = d_k.at[:seen].add(jnp.dot(d_scores.T, q.reshape(-1, H)))
            d_v = d_v.at[:seen].add(jnp.dot(weights.T, d_out))
        return jnp.concatenate(d_q, 1), d_k.astype(k_SH.dtype), d_v.astype(v_SH.dtype)

    d_qkv = jax.lax.map(one_head, (inputs, out_PGtH, lse_PGt, d_out_PGtH))
    return *d_qkv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


# -------------------------------------------------------------------------------------- sampling


def cache_attention(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """Attention of new tokens over a cache that already holds their own keys and values.

    A token at position p sees the cache's slots 0 to p. Returns [B, T, N, H].
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    G = N // K
    q_BKGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(
        'BKGTH,BKSH->BKGTS', q_BKGTH, k_BKSH, preferred_element_type=sum_dtype(q_BTNH)
    )
    seen_BTS = jnp.arange(S) <= positions_BT[..., None]
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores * H**-0.5, HIDDEN), axis=-1)
    out_BKGTH = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v_BKSH.dtype), v_BKSH)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)
