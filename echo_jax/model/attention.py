"""Causal attention within segments, for training, and over a key-value cache, for sampling.

B rows, T tokens, S cached tokens, N query heads, K key-value heads, G = N // K, H head dimension.

On a CPU, XLA runs plain two-dimensional products at over 100 GFLOP/s and batched ones at 10 to 40.
So `segment_attention` walks the (row, key-value head) pairs one at a time, folds a head's G queries
into the query length, and skips the key blocks that causality hides. Its own VJP keeps the output
and the log-sum-exp and computes the probabilities again. experiments/benchmarks/attention.py
measures it.
"""

import jax
import jax.numpy as jnp

from echo_jax.model.precision import sum_dtype

BLOCK = 128  # queries of one product; keys come in multiples of it
HIDDEN = -1e30  # a masked score; finite, so that a row without keys gives no NaN


def segment_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """Softmax attention of every token over the tokens of its own segment up to itself.

    Scores are scaled by H ** -0.5. Returns [B, T, N, H] in the dtype of the queries. Padding
    (segment 0) attends to padding, which is finite and carries no weight anywhere.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    G = N // K
    q_PGTH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, H)
    k_PTH, v_PTH = (x.transpose(0, 2, 1, 3).reshape(B * K, T, H) for x in (k_BTKH, v_BTKH))
    out_PGTH = _attend(q_PGTH, k_PTH, v_PTH, jnp.repeat(segment_ids_BT, K, axis=0))
    return out_PGTH.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _blocks(T):
    """(start, stop) of the query blocks; a block sees the keys [0, stop)."""
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def _scores(q_GtH, k_SH, segments_t, segments_S, start):
    """Masked, scaled scores [G, t, S], in `sum_dtype`, of the queries from position `start` on."""
    G, t, H = q_GtH.shape
    S = k_SH.shape[0]
    scores = jnp.dot(q_GtH.reshape(G * t, H), k_SH.T, preferred_element_type=sum_dtype(q_GtH))
    seen = start + jnp.arange(t)[:, None] >= jnp.arange(S)[None, :]
    seen &= segments_t[:, None] == segments_S[None, :]
    return jnp.where(seen, scores.reshape(G, t, S) * H**-0.5, HIDDEN)


@jax.custom_vjp
def _attend(q_PGTH, k_PTH, v_PTH, segments_PT):
    return _attend_forward(q_PGTH, k_PTH, v_PTH, segments_PT)[0]


def _attend_forward(q_PGTH, k_PTH, v_PTH, segments_PT):
    def one_head(args):
        q_GTH, k_TH, v_TH, segments_T = args
        G, T, H = q_GTH.shape
        out, lse = [], []
        for start, stop in _blocks(T):
            scores = _scores(
                q_GTH[:, start:stop], k_TH[:stop], segments_T[start:stop], segments_T[:stop], start
            )
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            mixed = jnp.dot(weights.astype(v_TH.dtype).reshape(-1, stop), v_TH[:stop])
            out.append((mixed.reshape(G, stop - start, H) / total).astype(q_GTH.dtype))
            lse.append((top + jnp.log(total))[..., 0])
        return jnp.concatenate(out, 1), jnp.concatenate(lse, 1)

    out_PGTH, lse_PGT = jax.lax.map(one_head, (q_PGTH, k_PTH, v_PTH, segments_PT))
    return out_PGTH, (q_PGTH, k_PTH, v_PTH, segments_PT, out_PGTH, lse_PGT)


def _attend_backward(residuals, d_out_PGTH):
    def one_head(args):
        q_GTH, k_TH, v_TH, segments_T, out_GTH, lse_GT, d_out_GTH = args
        _, T, H = q_GTH.shape
        wide = sum_dtype(q_GTH)
        d_q, d_k, d_v = [], jnp.zeros((T, H), wide), jnp.zeros((T, H), wide)
        for start, stop in _blocks(T):
            q, d_out = q_GTH[:, start:stop], d_out_GTH[:, start:stop]
            scores = _scores(q, k_TH[:stop], segments_T[start:stop], segments_T[:stop], start)
            weights = jnp.exp(scores - lse_GT[:, start:stop, None])
            inner = (d_out.astype(wide) * out_GTH[:, start:stop]).sum(-1, keepdims=True)
            d_out = d_out.reshape(-1, H)
            d_weights = jnp.dot(d_out, v_TH[:stop].T, preferred_element_type=wide)
            d_scores = weights * (d_weights.reshape(weights.shape) - inner) * H**-0.5
            d_scores = d_scores.reshape(-1, stop).astype(q.dtype)
            weights = weights.reshape(-1, stop).astype(q.dtype)
            d_q.append(jnp.dot(d_scores, k_TH[:stop]).reshape(q.shape))
            d_k = d_k.at[:stop].add(jnp.dot(d_scores.T, q.reshape(-1, H)))
            d_v = d_v.at[:stop].add(jnp.dot(weights.T, d_out))
        return jnp.concatenate(d_q, 1), d_k.astype(k_TH.dtype), d_v.astype(v_TH.dtype)

    d_q_PGTH, d_k_PTH, d_v_PTH = jax.lax.map(one_head, (*residuals, d_out_PGTH))
    return d_q_PGTH, d_k_PTH, d_v_PTH, None


_attend.defvjp(_attend_forward, _attend_backward)


def cache_attention(q_BTNH, k_BKSH, v_BKSH, positions_BT):
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
