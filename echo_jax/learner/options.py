"""What the keys of `loss` may be: names, ranges, and which of them make no sense together.

The names are those of the tables that the code itself looks them up in, so a name that is added
there is allowed here. run/checks.py asks before a run begins, `echo_loss` when it is traced.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections

from echo_jax.learner.advantages import ESTIMATORS
from echo_jax.learner.batching import REDUCTIONS
from echo_jax.learner.eligibility import EQUAL_GROUPS
from echo_jax.learner.kl import KL_ESTIMATORS
from echo_jax.learner.mismatch import CORRECTIONS
from echo_jax.learner.policy_losses import SURROGATES
from echo_jax.learner.targets import ENV_NORMALIZATIONS
from echo_jax.types import ENV_TARGETS

NAMES: Mapping[str, tuple[str, ...]] = {
    'targets': tuple(ENV_TARGETS),
    'equal_groups': EQUAL_GROUPS,
    'reduction': REDUCTIONS,
    'env_normalization': ENV_NORMALIZATIONS,
    'policy': tuple(SURROGATES),
    'old_logprobs': ('current', 'recomputed', 'rollout'),
    'mismatch': tuple(CORRECTIONS),
    'kl': tuple(KL_ESTIMATORS),
    'kl_in': ('loss', 'reward'),
    'advantages': ESTIMATORS,
}


class Range(NamedTuple):
    allows: Callable[[float], bool]  # False for NaN
    expected: str


RANGES: Mapping[str, Range] = {
    'clip_low': Range(lambda value: 0 <= value <= 1, 'between 0 and 1'),
    'clip_high': Range(lambda value: value >= 0, 'at least 0'),
    'dual_clip': Range(lambda value: value > 1, 'more than 1'),
    'dppo_tv': Range(lambda value: 0 < value < 1, 'between 0 and 1, both excluded'),
    'mismatch_cap': Range(lambda value: value >= 1, 'at least 1'),
    'kl_coef': Range(lambda value: value >= 0, 'at least 0'),
}


class Clash(NamedTuple):
    """Values that are each good, and make no sense together."""

    keys: tuple[str, ...]  # of `loss`; all that `when` reads
    when: Callable[[ml_collections.ConfigDict], bool]
    reason: str  # a sentence, after the keys and their values


CLASHES = (
    Clash(
        keys=('policy', 'mismatch'),
        when=lambda loss: loss.policy == 'gspo' and loss.mismatch in ('token', 'mask', 'icepop'),
        reason=(
            "the ratio of 'gspo' is the whole rollout's, so a weight of one token would scale the "
            "gradient of all; correct by rollout, with 'sequence' or 'geometric'"
        ),
    ),
    Clash(
        keys=('kl', 'kl_in', 'kl_coef'),
        when=lambda loss: loss.kl == 'k1' and loss.kl_in == 'loss' and loss.kl_coef > 0,
        reason=(
            'the gradient of k1 is that of log p alone, without the frozen model in it, so it '
            "pulls nowhere; set loss.kl to 'k2' or 'k3', or loss.kl_in to 'reward'"
        ),
    ),
    Clash(
        keys=('advantages', 'kl_in', 'kl_coef'),
        when=lambda loss: (
            loss.advantages == 'maxrl' and loss.kl_in == 'reward' and loss.kl_coef > 0
        ),
        reason=(
            "'maxrl' counts rewards below 0 as 0, so rollouts that failed would lose nothing by "
            "their KL; set loss.kl_in to 'loss'"
        ),
    ),
)


def check_options(loss: ml_collections.ConfigDict) -> None:
    """Refuses a name that `loss` does not know and a number out of its range."""
    for key, names in NAMES.items():
        if loss[key] not in names:
            raise ValueError(f'loss.{key} is {loss[key]!r}; expected one of {names}')
    for key, allowed in RANGES.items():
        if not allowed.allows(loss[key]):
            raise ValueError(f'loss.{key} is {loss[key]}; expected {allowed.expected}')


def check_clashes(loss: ml_collections.ConfigDict) -> None:
    """Refuses values of `loss` that make no sense together (CLASHES)."""
    for clash in CLASHES:
        if clash.when(loss):
            values = ', '.join(f'loss.{key}={loss[key]!r}' for key in clash.keys)
            raise ValueError(f'{values} make no sense together: {clash.reason}')
