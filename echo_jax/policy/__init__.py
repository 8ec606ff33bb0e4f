"""What an episode needs of a policy (docs/design.md#policy-and-sandbox).

vllm.py samples on GPUs, jax.py in the learner's process, scripted.py replays given replies.
"""

from typing import NamedTuple, Protocol

import numpy as np


class Generation(NamedTuple):
    """What the policy sampled in one turn; n tokens, the stop token included."""

    token_ids: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n], nats at the sampling temperature
    versions: np.ndarray  # int32 [n], published version that sampled the token
    finish_reason: str  # 'stop' (a stop token was sampled) or 'length'


class PolicyError(RuntimeError):
    """The policy itself failed for good: its worker has to end, and no rollout gets a reward."""


# What a swap of weights does with the turns that run; docs/design.md#swaps.
SWAPS = ('recompute', 'keep', 'drain')


def check_swap(swap: str) -> None:
    """Raises ValueError unless `policy.swap` is one of SWAPS."""
    if swap not in SWAPS:
        raise ValueError(f'policy.swap is {swap!r}; expected one of {SWAPS}')


class Policy(Protocol):
    """Whatever samples tokens; one object serves any number of episodes at once."""

    async def generate(
        self,
        token_ids: np.ndarray,  # int32 [T], the whole context
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Generation:
        """Samples until a stop token or `max_tokens`; the same seed gives the same sample."""
        ...
