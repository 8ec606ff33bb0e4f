"""Ratios of two policies' probabilities, of tokens and of whole rollouts, from log-probabilities.

R rows, T tokens. A rollout is a segment of a row: nothing here crosses from one to another.
"""

import jax
import jax.numpy as jnp
import numpy as np

# A Batch's arrays are NumPy on the host, and traced in the step.
Array = jax.Array | np.ndarray
# Every log-ratio is held within this before exp. exp(89) is inf in float32, and inf - inf in a
# later sum would be NaN; exp(20) = 5e8 is finite, and far beyond any bound that clips a ratio.
MAX_LOG_RATIO = 20.0


def bounded(log_ratio: jax.Array) -> jax.Array:
    return jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def segment_sum(values_RT: Array, segment_ids_RT: Array) -> jax.Array:
    """For each token, the sum of the values over its segment of the row, [R, T]."""
    return jax.vmap(_segment_sum)(values_RT, segment_ids_RT)


def segment_mean(values_RT: jax.Array, mask_RT: Array, segment_ids_RT: Array) -> jax.Array:
    """For each token, the mean over the tokens of its segment that `mask` has, [R, T].

    The values outside the mask must be 0. A segment without a token of the mask has mean 0.
    """
    count_RT = segment_sum(mask_RT.astype(values_RT.dtype), segment_ids_RT)
    return segment_sum(values_RT, segment_ids_RT) / jnp.maximum(count_RT, 1.0)


def _segment_sum(values: Array, segment_ids: Array) -> jax.Array:
    # jit needs a static number: a row of T tokens has at most T segments, and 0 is the padding.
    sums = jax.ops.segment_sum(values, segment_ids, num_segments=segment_ids.size + 1)
    return sums[segment_ids]
