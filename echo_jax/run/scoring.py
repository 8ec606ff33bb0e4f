"""A model to score with, and token arrays: read, checked, and scored in batches."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from echo_jax.learner.batching import make_token_batch
from echo_jax.learner.checkpoint import open_saved
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.run.report import Progress
from echo_jax.run.workdir import Workdir
from echo_jax.types import Batch


def load_params(model: ShardedModel, work: Workdir | None, step: int | None) -> nnx.State:
    """The parameters of the run's `step` or its last; without a run, of the model directory."""
    if work is None:
        settings = model.config.model
        abstract = jax.tree.map(lambda leaf: leaf.update(dtype=settings.dtype), model.abstract)
        return huggingface.load_params(settings.path, abstract, model.placed)
    wanted = jax.tree.map(
        lambda leaf, place: leaf.update(sharding=place), model.abstract, model.placed
    )
    checkpointer, step = open_saved(work.url('checkpoints', 'train'), step)
    state, _, _ = checkpointer.restore({'params': wanted}, step)
    checkpointer.close()
    return state['params']


def read_tokens(file: str) -> np.ndarray:
    """[N, T] integers, memory-mapped; raises ValueError if they are not such an array."""
    try:
        tokens = np.load(file, mmap_mode='r')
    except (ValueError, EOFError) as error:
        raise ValueError(f'{file} is not a .npy array; expected integers [N, T]') from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in 'iu':
        found = f'{tokens.dtype} {tokens.shape}' if hasattr(tokens, 'dtype') else 'an archive'
        raise ValueError(f'{file} is {found}; expected integers [N, T], such as int32')
    if not tokens.size:
        raise ValueError(f'{file} is of shape {tokens.shape}; expected at least one token')
    return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, pad_id: int | None = None) -> None:
    """Raises ValueError for an id outside the vocabulary that is not `pad_id` at a row's end."""
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if pad_id is not None:
        wrong &= ~np.logical_and.accumulate((tokens == pad_id)[:, ::-1], axis=1)[:, ::-1]
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f'token {tokens[row, column]} at [{row}, {column}]; expected ids from 0 to '
            f'{vocab_size - 1}, the vocabulary of the model'
        )


def score_tokens(
    score: Callable[[Batch], jax.Array],
    tokens: np.ndarray,
    rows: int,
    length: int,
    pad_id: int | None = None,
) -> np.ndarray:
    """Log-probabilities, float32 [N, T], of `tokens` [N, T]; column 0 is 0.

    They are scored in batches [rows, length >= T] by `score(batch) -> [rows, length]`. What
    follows a row's last token other than `pad_id` is padding, which scores 0. Raises
    FloatingPointError if a log-probability is not finite.
    """
    N, T = tokens.shape
    logprobs = np.zeros((N, T), np.float32)
    with Progress('score', N) as progress:
        for start in range(0, N, rows):
            part = tokens[start : start + rows]
            batch = make_token_batch(part, rows, length, pad_id)
            found = np.where(batch.segment_ids > 0, score(batch), 0.0)[: len(part), :T]
            if not np.isfinite(found).all():
                raise FloatingPointError(
                    f'rows {start} to {start + len(part) - 1} have a log-probability that is not '
                    'finite; the weights are damaged, or too large for this dtype'
                )
            logprobs[start : start + rows] = found
            progress.show(start + len(part))
    return logprobs
