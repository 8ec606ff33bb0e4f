"""Surrogates, by `loss.policy`: what the policy term raises (docs/design.md#objective).

R rows, T tokens. With ratio r and advantage A, a surrogate gives a value of each token whose
weighted sum is raised, and the masks of tokens at which one of its bounds acts. Weights and the
correction for the sampler's mismatch are not its business: losses.py has them.

In the first update of a batch with `loss.old_logprobs` 'current' or 'recomputed', every r is 1 and
no bound acts; then each surrogate has the gradient A on every token, which is GRPO's.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from echo_jax.learner.ratios import Array, bounded, segment_mean


class Tokens(NamedTuple):
    """What a surrogate is given, [R, T]; log-probabilities are 0 where `acting` is False."""

    logprobs: jax.Array  # float, nats, of the policy being trained
    old_logprobs: jax.Array  # float, nats, a constant
    log_ratio: jax.Array  # float, their difference, bounded
    ratio: jax.Array  # float, its exp
    advantages: Array  # float
    acting: Array  # bool, the tokens that are trained on
    segment_ids: Array  # int


class Bounds(NamedTuple):
    """The keys of `loss` that bound an update; a surrogate reads those that it has."""

    clip_low: float
    clip_high: float
    dual_clip: float
    dppo_tv: float


Shares = dict[str, Array]  # bool [R, T] by metric: its mean over the tokens is logged
Surrogate = Callable[[Tokens, Bounds], tuple[jax.Array, Shares]]


def clip(tokens: Tokens, bounds: Bounds) -> tuple[jax.Array, Shares]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO's (arXiv 1707.06347, eq. 7)."""
    gain, is_clipped = _clipped(tokens.ratio, tokens.advantages, bounds)
    return gain, {'clip_fraction': is_clipped}


def dual_clip(tokens: Tokens, bounds: Bounds) -> tuple[jax.Array, Shares]:
    """'clip', and for A < 0 not below dual_clip A, dual_clip > 1 (arXiv 1912.09729).

    'clip' has no bound where A < 0 and r is large: there one token could outweigh all others.
    """
    gain, is_clipped = _clipped(tokens.ratio, tokens.advantages, bounds)
    floor = bounds.dual_clip * tokens.advantages
    is_floored = (tokens.advantages < 0) & (gain < floor)
    shares = {'clip_fraction': is_clipped, 'dual_clip_fraction': is_floored}
    return jnp.where(is_floored, floor, gain), shares


def gspo(tokens: Tokens, bounds: Bounds) -> tuple[jax.Array, Shares]:
    """'clip' of the rollout's ratio, the geometric mean of its tokens' (arXiv 2507.18071).

    All ACTION tokens of a rollout get its one value, so they are clipped together, and by the
    weights of 'sequence_mean' they add up to the paper's mean over rollouts. The mean is
    differentiated as it stands (the paper's GSPO, not its GSPO-token).
    """
    # The mean is bounded and not its terms: one far-off token among many is what it evens out.
    log_ratio = segment_mean(
        tokens.logprobs - tokens.old_logprobs, tokens.acting, tokens.segment_ids
    )
    gain, is_clipped = _clipped(jnp.exp(bounded(log_ratio)), tokens.advantages, bounds)
    return gain, {'clip_fraction': is_clipped}


def cispo(tokens: Tokens, bounds: Bounds) -> tuple[jax.Array, Shares]:
    """clip(r, 1 - clip_low, 1 + clip_high) as a constant, times A log p (arXiv 2506.13585, eq. 4).

    A bound scales a token's gradient and never takes it away. The paper leaves out the lower bound,
    which is clip_low = 1.
    """
    held = jnp.clip(tokens.ratio, 1.0 - bounds.clip_low, 1.0 + bounds.clip_high)
    weight = jax.lax.stop_gradient(held) * tokens.advantages
    return weight * tokens.logprobs, {'clip_fraction': held != tokens.ratio}


def dppo(tokens: Tokens, bounds: Bounds) -> tuple[jax.Array, Shares]:
    """r A, but 0 where |p - old p| > dppo_tv and r A would move p further away.

    That is where A > 0 and r > 1, or A < 0 and r < 1 (DPPO with the binary total variation, arXiv
    2602.04879). A ratio says little of a rare token, whose r may be large while p hardly moved; and
    a frequent token can move far with a ratio near 1.
    """
    ratio, advantages = tokens.ratio, tokens.advantages
    distance = jnp.abs(jnp.exp(tokens.logprobs) - jnp.exp(tokens.old_logprobs))
    away = ((advantages > 0) & (ratio > 1.0)) | ((advantages < 0) & (ratio < 1.0))
    is_masked = away & (distance > bounds.dppo_tv)
    return jnp.where(is_masked, 0.0, ratio * advantages), {'masked_fraction': is_masked}


SURROGATES: Mapping[str, Surrogate] = {
    'clip': clip,
    'dual_clip': dual_clip,
    'gspo': gspo,
    'cispo': cispo,
    'dppo': dppo,
}


def _clipped(ratio: jax.Array, advantages: Array, bounds: Bounds) -> tuple[jax.Array, Array]:
    """The smaller of r A and the clipped r's A, and where that is the clipped one's."""
    gain = ratio * advantages
    clipped_gain = jnp.clip(ratio, 1.0 - bounds.clip_low, 1.0 + bounds.clip_high) * advantages
    is_clipped = clipped_gain < gain
    # `where`, not `minimum`: at a tie, and in a first update every ratio is 1, `minimum` splits the
    # gradient between its arguments; if clip_low or clip_high is 0, half of it would be lost.
    return jnp.where(is_clipped, clipped_gain, gain), is_clipped
