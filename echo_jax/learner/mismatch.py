"""Corrections for the sampler's mismatch, by `loss.mismatch` (docs/design.md#objective).

The sampler's probabilities are not quite the learner's: it has other kernels, another dtype and
perhaps older weights. d is the old policy's log-probability minus the sampler's; both are
constants, and so is the weight w of a token's policy term that is made of d here.

R rows, T tokens. `d` is 0 where `acting`, the tokens that the policy term trains on, is False.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from echo_jax.learner.ratios import Array, bounded, segment_mean, segment_sum

# A function of (d, acting, segment_ids, cap) that gives w, all [R, T] but the number `cap`.
Correction = Callable[[jax.Array, Array, Array, float], jax.Array]


def none(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    del acting, segment_ids, cap
    return jnp.ones_like(d)


def token(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    """min(exp(d), cap), truncated importance sampling."""
    del acting, segment_ids
    return jnp.minimum(jnp.exp(bounded(d)), cap)


def sequence(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    """The same with d summed over the rollout: the ratio of the whole rollout."""
    del acting
    # The sum is bounded, not each token: many small differences make a large one.
    return jnp.minimum(jnp.exp(bounded(segment_sum(d, segment_ids))), cap)


def mask(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    """1 if 1/cap <= exp(d) <= cap, else 0: far-off tokens are left out, the others not weighted."""
    del acting, segment_ids
    return (jnp.abs(d) <= jnp.log(cap)).astype(d.dtype)


def icepop(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    """exp(d) if 1/cap <= exp(d) <= cap, else 0 (IcePop, arXiv 2510.18855, with alpha = 1/beta)."""
    return jnp.exp(bounded(d)) * mask(d, acting, segment_ids, cap)


def geometric(d: jax.Array, acting: Array, segment_ids: Array, cap: float) -> jax.Array:
    """1 for a rollout whose geometric mean of exp(d) lies within [1/cap, cap], else 0.

    Unlike the product of 'sequence', the mean does not grow with the rollout's length, so long
    rollouts are not left out for being long (https://richardli.xyz/post/rl-collapse-part3).
    """
    mean = segment_mean(d, acting, segment_ids)
    return (jnp.abs(mean) <= jnp.log(cap)).astype(d.dtype)


CORRECTIONS: Mapping[str, Correction] = {
    'none': none,
    'token': token,
    'sequence': sequence,
    'mask': mask,
    'geometric': geometric,
    'icepop': icepop,
}
# Those that may give a token weight 0, which `train/mismatch_masked` counts.
MASKING = ('mask', 'geometric', 'icepop')
