"""A policy that says what it was told to: warm-start solutions, exploration, tests.

Samples nothing and has no weights; its log-probabilities are 0 and its version is 0.
"""

import numpy as np
import transformers

from echo_jax.policy import Generation


class ScriptedPolicy:
    """Gives replies[n] in turn n, special tokens recognised, and the turn's end.

    It keeps no count: the turn is read off the context, so one object serves any number of
    episodes at once, and a retried one starts over.

    Raises ValueError for a reply that would open a turn itself.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast, replies: list[str]):
        if opening := [reply for reply in replies if '<|im_start|>' in reply]:
            raise ValueError(f'a reply holds <|im_start|>, which would open a turn: {opening[0]!r}')
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
        """Raises ValueError after the last reply. temperature and seed change nothing."""
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
