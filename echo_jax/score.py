"""Per-token log-probabilities of given tokens under a model directory or a run's checkpoint.

    python -m echo_jax.score --model=HF_DIR --tokens=tokens.npy --output=logprobs.npy
    python -m echo_jax.score --workdir=runs/tiny --step=80 --tokens=tokens.npy --output=logprobs.npy

tokens.npy is [N, T] of integers; logprobs.npy is float32 [N, T], nats: a token's log-probability
given those before it in its row, divided by --temperature in the logits. Column 0 is 0. It computes
on all devices of one host and knows nothing of roles, rewards and losses.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from absl import flags, logging
from flax import nnx

from echo_jax import program
from echo_jax.export import open_checkpoints
from echo_jax.learner.batching import make_token_batch
from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.learner.step import Programs
from echo_jax.model import huggingface
from echo_jax.report import Progress
from echo_jax.types import Batch
from echo_jax.workdir import Workdir


def read_tokens(file: str) -> np.ndarray:
    """[N, T] integers, memory-mapped; ValueError where they are no such array."""
    try:
        tokens = np.load(file, mmap_mode='r')
    except (ValueError, EOFError) as error:
        raise ValueError(f'{file} is no .npy array; expected integers [N, T]') from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in 'iu':
        found = f'{tokens.dtype} {tokens.shape}' if hasattr(tokens, 'dtype') else 'an archive'
        raise ValueError(f'{file} is {found}; expected integers [N, T], such as int32')
    if not tokens.size:
        raise ValueError(f'{file} is of shape {tokens.shape}; expected at least one token')
    return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, pad_id: int | None = None) -> None:
    """Raises ValueError for an id that is neither in the vocabulary nor `pad_id`."""
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if pad_id is not None:
        wrong &= tokens != pad_id
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
    """float32 [N, T] of `tokens` [N, T], in batches [rows, length >= T]; 0 in column 0.

    `score(batch) -> [rows, length]`. What follows a row's last token other than `pad_id` is
    padding: it scores 0. Raises FloatingPointError where a log-probability is not finite.
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


def _config(model: dict, rows: int, length: int, dtype: str) -> ml_collections.ConfigDict:
    """What `Programs` needs: rows, and whatever lies along 'embed', over all devices."""
    # Kernels of accelerators multiply in less than float32.
    attention = 'blocks' if dtype == 'float32' else 'auto'
    return ml_collections.ConfigDict(
        {
            'model': model | {'dtype': dtype, 'attention': attention},
            'mesh': {'data': 1, 'fsdp': -1, 'context': 1, 'tensor': 1},
            'sharding': {'embed': 'fsdp'},
            'batch': {'micro_rows': rows, 'seq_len': length},
        }
    )


def _params(programs: Programs, work: Workdir | None, step: int | None) -> nnx.State:
    """Of the run's `step`, or its last; without a run, of the directory, in the dtype asked for."""
    model = programs.config.model
    if work is None:
        abstract = jax.tree.map(lambda leaf: leaf.update(dtype=model.dtype), programs.abstract)
        return huggingface.load_params(model.path, abstract, programs.placed)
    wanted = jax.tree.map(
        lambda leaf, place: leaf.update(sharding=place), programs.abstract, programs.placed
    )
    checkpointer, step = open_checkpoints(work, step)
    state, _, _ = checkpointer.restore({'params': wanted}, step)
    checkpointer.close()
    return state['params']


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    if bool(_MODEL.value) == bool(_WORKDIR.value):
        raise ValueError('expected either --model, a directory, or --workdir, a run')
    if _MODEL.value and _STEP.value is not None:
        raise ValueError('--step is of a run; give --workdir instead of --model, or no --step')
    if not _TEMPERATURE.value > 0:
        raise ValueError(f'--temperature is {_TEMPERATURE.value}; expected more than 0')
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after all the work
    work = Workdir.open(_WORKDIR.value) if _WORKDIR.value else None
    model = work.config.model.to_dict() if work else {'path': _MODEL.value}
    tokens = read_tokens(_TOKENS.value)

    if _DTYPE.value == 'float32':  # an accelerator's default is less
        jax.config.update('jax_default_matmul_precision', 'highest')
    devices = jax.device_count()
    rows = -(-_ROWS.value // devices) * devices
    block = 1 if jax.default_backend() == 'cpu' else 128  # of an accelerator's attention
    length = -(-tokens.shape[1] // block) * block
    programs = Programs.of(_config(model, rows, length, _DTYPE.value))
    check_tokens(tokens, programs.model.vocab_size, _PAD_ID.value)
    params = _params(programs, work, _STEP.value)
    score = functools.partial(programs.score(_TEMPERATURE.value), params)
    logprobs = score_tokens(score, tokens, rows, length, _PAD_ID.value)
    partial = output.with_name(output.name + '.partial')
    with partial.open('wb') as file:
        np.save(file, logprobs)
    partial.rename(output)


if __name__ == '__main__':
    _MODEL = flags.DEFINE_string('model', '', 'Hugging Face directory.')
    _WORKDIR = flags.DEFINE_string('workdir', '', 'Run, instead of --model.')
    _STEP = flags.DEFINE_integer('step', None, 'Saved step of the run; none: the last.')
    _TOKENS = flags.DEFINE_string('tokens', None, '.npy of integers [N, T].')
    _OUTPUT = flags.DEFINE_string('output', None, '.npy to write, float32 [N, T].')
    _TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'What the logits are divided by.')
    _PAD_ID = flags.DEFINE_integer('pad_id', None, 'Id that rows are filled up with at their end.')
    _ROWS = flags.DEFINE_integer('rows', 8, 'Rows at a time.', lower_bound=1)
    _DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'To compute in.')
    flags.mark_flags_as_required(['tokens', 'output'])
    program.run(main, CheckpointError)
