"""Log-probabilities of given tokens from hidden states, without whole logits in memory.

M tokens, D model, V vocabulary; m tokens and v words are one block of logits.

Forward and backward walk blocks of tokens and of words, so memory does not grow with M times V. On
a mesh every device scores its own tokens. Blocks of the head are gathered when they are needed,
over the mesh axes that split 'embed', and their gradients are summed and split over these again. If
'vocab' is split, its parts are combined as blocks are.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from echo_jax.model import partition
from echo_jax.model.axes import STATES, TOKENS
from echo_jax.model.precision import sum_dtype
from echo_jax.types import TokenScores

MAX_WORDS = 2048  # v
MAX_LOGITS = 1 << 25  # m times v: 128 MiB in float32

_HEAD = ('vocab', 'embed')


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def score_tokens(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> TokenScores:
    """Log-probabilities of the targets, and the entropy of what they were drawn from.

    docs/design.md#the-step

    Args:
      hidden: [B, T, D], any float dtype; the states that predict the targets.
      unembedding: [V, D], taken in the dtype of `hidden`.
      targets: int32 [B, T], the tokens that come next.
      temperature: the logits are divided by it; the sampler's, so that both sides mean the same.

    Returns:
      TokenScores of float32 [B, T]; only `logprobs` passes gradients.
    """
    return _forward(hidden, unembedding, targets, temperature)[0]


def token_logprobs(
    hidden: jax.Array, unembedding: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities, entropy), float32 [...], of targets [...] from states [..., D].

    This is what tools outside the project call (docs/design.md#the-step). The step itself calls
    `score_tokens`, which gives one number more from the same pass.
    """
    rows = hidden.reshape(-1, *hidden.shape[-2:]) if hidden.ndim > 1 else hidden[None, None]
    scores = score_tokens(rows, unembedding, targets.reshape(rows.shape[:2]), temperature)
    return scores.logprobs.reshape(targets.shape), scores.entropy.reshape(targets.shape)


def _forward(hidden, unembedding, targets, temperature):
    score = partition.per_device(
        functools.partial(_score, temperature=temperature),
        in_axes=(STATES, _HEAD, TOKENS),
        out_axes=(TOKENS, TOKENS),
    )
    scores, lse = score(hidden, unembedding, targets)
    return scores, (hidden, unembedding, targets, lse)


def _backward(temperature, residuals, cotangents):
    pull = partition.per_device(
        functools.partial(_pull, temperature=temperature),
        in_axes=(STATES, _HEAD, TOKENS, TOKENS, TOKENS),
        out_axes=(STATES, _HEAD),
    )
    return *pull(*residuals, cotangents.logprobs), None


score_tokens.defvjp(_forward, _backward)


class _Sums(NamedTuple):
    """Sums over the words so far, [m] each."""

    top: jax.Array  # the largest logit
    total: jax.Array  # sum of exp(logit - top)
    total_t1: jax.Array  # the same at temperature 1
    weighted: jax.Array  # sum of exp(logit - top) * logit
    target: jax.Array  # the target's logit


def _score(hidden, unembedding, targets, temperature):
    """(TokenScores, log-sum-exp) of the tokens [b, t] of one device."""
    words, count = _word_blocks(unembedding)

    def block(hidden_mD, targets_m):
        def add(number, sums):
            rows_vD, ids_v, fresh_v, _ = _head_block(unembedding, number, words, hidden.dtype)
            # Words that the block before has counted already: exp(-inf) is 0 in every sum.
            logits_mv = jnp.where(fresh_v, _logits(hidden_mD, rows_vD) / temperature, -jnp.inf)
            hit_mv = (targets_m[:, None] == ids_v) & fresh_v
            top = jnp.maximum(sums.top, logits_mv.max(-1))
            # Sums are kept relative to the largest logit so far: exp of a logit of 89 is infinite
            # in float32. When a block brings a larger one, the old sums are scaled down to it.
            above = logits_mv - top[:, None]
            weights = jnp.exp(above)
            weights_t1 = weights if temperature == 1.0 else jnp.exp(above * temperature)
            old = sums.top - top
            return _Sums(
                top,
                sums.total * jnp.exp(old) + weights.sum(-1),
                sums.total_t1 * jnp.exp(old * temperature) + weights_t1.sum(-1),
                # `where` again, since 0 * -inf is NaN.
                sums.weighted * jnp.exp(old) + jnp.where(fresh_v, weights * logits_mv, 0.0).sum(-1),
                sums.target + jnp.where(hit_mv, logits_mv, 0.0).sum(-1),
            )

        zero = jnp.zeros(targets_m.shape, sum_dtype(hidden_mD))
        # Any logit is larger than -inf, so exp(old) is 0 in the first block.
        first = _Sums(jnp.full_like(zero, -jnp.inf), zero, zero, zero, zero)
        return _combine(jax.lax.fori_loop(0, count, add, first), temperature)

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    blocks, size = _in_blocks(flat, words)
    scores, lse = jax.lax.map(lambda xs: block(*xs), blocks)
    return jax.tree.map(lambda x: x.reshape(-1)[:size].reshape(targets.shape), (scores, lse))


def _combine(sums: _Sums, temperature: float):
    """(TokenScores, log-sum-exp) [m] out of the sums over this device's words."""
    axes = partition.mesh_axes('vocab')
    if axes:
        # Each device has seen its own words only, so their sums are combined like those of blocks.
        top = jax.lax.pmax(sums.top, axes)
        part, part_t1 = jnp.exp(sums.top - top), jnp.exp((sums.top - top) * temperature)
        total, total_t1, weighted, target = jax.lax.psum(
            (sums.total * part, sums.total_t1 * part_t1, sums.weighted * part, sums.target), axes
        )
        sums = _Sums(top, total, total_t1, weighted, target)
    lse = sums.top + jnp.log(sums.total)
    # A logit at temperature 1 is the one at the sampling temperature times that temperature.
    lse_t1 = sums.top * temperature + jnp.log(sums.total_t1)
    # The entropy -sum p log p is lse - sum p * logit.
    scores = TokenScores(
        sums.target - lse, lse - sums.weighted / sums.total, sums.target * temperature - lse_t1
    )
    return scores, lse


def _pull(hidden, unembedding, targets, lse, cotangent, temperature):
    """(d hidden, d unembedding) of one device, from the cotangent of the log-probabilities.

    Words are the outer loop and tokens the inner one, so that the gradient of a block of words is
    complete, and is summed over the devices once, before the next block begins.
    """
    D = hidden.shape[-1]
    (words, count), wide = _word_blocks(unembedding), sum_dtype(hidden)
    flat = [hidden.reshape(-1, D), *(x.reshape(-1) for x in (targets, lse, cotangent))]
    blocks, size = _in_blocks(flat, words)

    def head_block(number, carry):
        d_hidden, d_unembedding = carry
        rows_vD, ids_v, fresh_v, at = _head_block(unembedding, number, words, hidden.dtype)

        def token_block(d_rows_vD, xs):
            (hidden_mD, targets_m, lse_m, d_m), d_hidden_mD = xs
            # Computed again from the log-sum-exp. Kept, they would be as large as whole logits.
            probs_mv = jnp.exp(_logits(hidden_mD, rows_vD) / temperature - lse_m[:, None])
            d_logits_mv = ((targets_m[:, None] == ids_v) - probs_mv) * (d_m / temperature)[:, None]
            # The gradient of words that were in the block before is complete already.
            d_logits_mv = jnp.where(fresh_v, d_logits_mv, 0.0).astype(hidden.dtype)
            # Both are sums over many blocks, in float32, as in `partition.matmul`.
            d_rows_vD += jnp.dot(d_logits_mv.T, hidden_mD, preferred_element_type=wide)
            d_hidden_mD += jnp.dot(d_logits_mv, rows_vD, preferred_element_type=wide)
            return d_rows_vD, d_hidden_mD

        d_rows_vD, d_hidden = jax.lax.scan(
            token_block, jnp.zeros(rows_vD.shape, wide), (blocks, d_hidden)
        )
        d_rows = partition.sum_over_tokens(d_rows_vD, 1).astype(unembedding.dtype)
        # The last block may begin with rows that the one before has written; they are kept.
        old = jax.lax.dynamic_slice_in_dim(d_unembedding, at, words)
        d_rows = jnp.where(fresh_v[:, None], d_rows, old)
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_unembedding, d_rows, at, 0)

    start = jnp.zeros(blocks[0].shape, wide), jnp.zeros_like(unembedding)
    d_hidden, d_unembedding = jax.lax.fori_loop(0, count, head_block, start)
    axes = partition.mesh_axes('vocab')
    if axes:  # a state predicts the words of all devices, so their gradients add up
        d_hidden = jax.lax.psum(d_hidden, axes)
    d_hidden = d_hidden.reshape(-1, D)[:size].reshape(hidden.shape)
    return d_hidden.astype(hidden.dtype), d_unembedding


def _word_blocks(unembedding) -> tuple[int, int]:
    """(v, how many blocks of v words there are)."""
    words = min(MAX_WORDS, unembedding.shape[0])
    return words, -(-unembedding.shape[0] // words)


def _in_blocks(arrays, words: int):
    """(the arrays [M, ...] as [blocks, m, ...], padded with zeros; M)."""
    size = arrays[0].shape[0]
    # As few blocks as MAX_LOGITS allows, and of equal size, so that little of the last is padding.
    count = -(-size * words // MAX_LOGITS)
    block = -(-size // count)
    pad = count * block - size
    return tuple(
        jnp.pad(a, [(0, pad), *[(0, 0)] * (a.ndim - 1)]).reshape(count, block, *a.shape[1:])
        for a in arrays
    ), size


def _head_block(unembedding, number, words: int, dtype):
    """Block `number` of this device's words: (rows [v, D], ids [v], whether new [v], first row).

    All blocks have v words, because a loop has one shape. So the last one, which ends with the last
    word, may begin with words that were in the block before.
    """
    start = number * words
    at = jnp.minimum(start, unembedding.shape[0] - words)
    rows = jax.lax.dynamic_slice_in_dim(unembedding, at, words).astype(dtype)
    # Minor axes first, the reverse of how they were split; otherwise the columns come out of order.
    for axis in reversed(partition.mesh_axes('embed')):
        rows = jax.lax.all_gather(rows, axis, axis=1, tiled=True)
    places = at + jnp.arange(words)
    offset = 0
    axes = partition.mesh_axes('vocab')
    if axes:
        offset = jax.lax.axis_index(axes) * unembedding.shape[0]
    return rows, offset + places, places >= start, at


def _logits(hidden_mD, rows_vD):
    return jnp.dot(hidden_mD, rows_vD.T, preferred_element_type=sum_dtype(hidden_mD))
