"""What an episode needs of a policy (DESIGN 3.7): `vllm.py` for GPUs, `jax.py` embedded."""

from typing import NamedTuple, Protocol

import numpy as np


class Generation(NamedTuple):
    """What the policy sampled in one turn; n tokens, the stop token included."""

    token_ids: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n], nats at the sampling temperature
    versions: np.ndarray  # int32 [n], published version that sampled the token
    finish_reason: str  # 'stop' (a stop token was sampled) or 'length'


class PolicyError(RuntimeError):
    """The policy itself failed, for good: fatal for its worker, nobody's reward."""


class Policy(Protocol):
    async def generate(
        self,
        token_ids: np.ndarray,  # int32 [T], the whole context
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Generation: ...
