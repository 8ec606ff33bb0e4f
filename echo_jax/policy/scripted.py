"""A policy that replays given replies, for warm-start solutions, exploration and tests.

It samples nothing and has no weights; its log-probabilities are 0 and its version is 0.
"""

import numpy as np
import transformers

from echo_jax.policy import Generation


class ScriptedPolicy:
    """Gives replies[n] in turn n, with special tokens recognised, and ends the turn.

    It keeps no count but reads the turn off the context, so one object serves any number of
    episodes at once, and an episode that is tried again starts over. The constructor raises
    ValueError for a reply that would open a turn itself.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, replies: list[str]):
        for reply in replies:
            if '<|im_start|>' in reply:
                raise ValueError(
                    f'a reply holds <|im_start|>, which would open a turn: {reply!r}; take it out'
                )
        self._replies = [
            tokenizer.encode(reply + '<|im_end|>', add_special_tokens=False) for reply in replies
        ]
        self._turn_opening = tokenizer.encode('<|im_start|>assistant', add_special_tokens=False)

    async def generate(
        self,
        token_ids: np.ndarray,
        *,
        max_tokens: int,
        temperature: float,
        seed: int,
        stop_token_ids: tuple[int, ...],
    ) -> Generation:
        """Ignores temperature, seed and stop tokens; raises ValueError after the last reply."""
        del temperature, seed, stop_token_ids
        context = np.asarray(token_ids)
        width = len(self._turn_opening)
        windows = np.lib.stride_tricks.sliding_window_view(context, width)
        turn = int((windows == self._turn_opening).all(axis=1).sum()) - 1
        if not 0 <= turn < len(self._replies):
            raise ValueError(
                f'turn {turn} of a script of {len(self._replies)} replies; end it with done'
            )
        ids = np.asarray(self._replies[turn][:max_tokens], np.int32)
        finished = len(self._replies[turn]) <= max_tokens
        zeros = np.zeros(len(ids))
        return Generation(
            ids, zeros.astype(np.float32), zeros.astype(np.int32), 'stop' if finished else 'length'
        )
