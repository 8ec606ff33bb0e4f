"""Drops the targets that surprise the policy most, or least (`loss.drop_surprising`).

The most surprising are often noise that nobody can predict, the least what is known already.
Rho-1 (arXiv 2404.07965) selects the tokens of pre-training by their loss, less a reference model's;
PaW (arXiv 2606.02388) selects whole observations for its world-model loss, by the entropy of the
action before, and makes that loss tolerant to noise. Here it is the current policy's cross-entropy
of each target, over all targets of a step. NumPy only.
"""

import math
from collections.abc import Sequence

import numpy as np

from echo_jax.learner.targets import Targets


def select_by_surprise(
    ce: np.ndarray, mask: np.ndarray, share_top: float, share_bottom: float
) -> np.ndarray:
    """bool, the shape of `mask`: what stays of it without its largest and smallest `ce`.

    `ce` is float in nats; outside `mask` it may hold anything. Of n values, floor(share n) are
    dropped at either end. Values that are equal stay or go together, so that the order of tokens
    plays no part: at the edge they stay, and fewer are dropped.
    """
    values = np.sort(ce[mask])
    n = len(values)
    # A billionth, because 0.29 * 100 is 29 and not 28.999999999999996.
    top, bottom = (math.floor(share * n + 1e-9) for share in (share_top, share_bottom))
    if top + bottom >= n:
        return np.zeros_like(mask)
    low, high = values[bottom], values[n - 1 - top]
    with np.errstate(invalid='ignore'):  # NaN outside the mask
        return mask & (ce >= low) & (ce <= high)


def drop_by_surprise(
    targets: Sequence[Targets],
    logprobs: Sequence[np.ndarray],
    share_top: float,
    share_bottom: float,
) -> list[Targets]:
    """The targets of a step's rollouts without the most and the least surprising of them all.

    `logprobs` are float [T] of each rollout's tokens by the current policy, in nats.
    """
    if not targets:
        return []
    mask = np.concatenate([t.chosen for t in targets])
    kept = select_by_surprise(-np.concatenate(logprobs), mask, share_top, share_bottom)
    parts = np.split(kept, np.cumsum([len(t.chosen) for t in targets])[:-1])
    return [
        Targets(chosen=keep, dropped=t.dropped | (t.chosen & ~keep))
        for t, keep in zip(targets, parts)
    ]
