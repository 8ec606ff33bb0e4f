"""Per-token log-probabilities of given tokens under a model directory or a run's checkpoint.

    python -m echo_jax.score --model=HF_DIR --tokens=tokens.npy --output=logprobs.npy
    python -m echo_jax.score --workdir=runs/tiny --step=80 --tokens=tokens.npy --output=logprobs.npy

tokens.npy is [N, T] of integers; logprobs.npy is float32 [N, T], nats: a token's log-probability
given those before it in its row, divided by --temperature in the logits. Column 0 is 0. It computes
on all devices of one host and knows nothing of roles, rewards and losses.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from echo_jax import program
from echo_jax.export import open_checkpoints
from echo_jax.learner import sharding
from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.learner.step import make_score
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.report import Progress
from echo_jax.types import Batch
from echo_jax.workdir import Workdir

_MESH = {'mesh': {'data': 1, 'fsdp': -1, 'context': 1, 'tensor': 1}}
_RULES = {'embed': 'fsdp'}


def read_tokens(file: str, vocab_size: int, pad_id: int | None = None) -> np.ndarray:
    """[N, T] integers; ValueError where they are no such array or no tokens of this vocabulary."""
    try:
        tokens = np.load(file, mmap_mode='r')
    except (ValueError, EOFError) as error:
        raise ValueError(f'{file} is no .npy array; expected integers [N, T]') from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in 'iu':
        found = f'{tokens.dtype} {tokens.shape}' if hasattr(tokens, 'dtype') else 'an archive'
        raise ValueError(f'{file} is {found}; expected integers [N, T], such as int32')
    if not tokens.size:
        raise ValueError(f'{file} is of shape {tokens.shape}; expected at least one token')
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if pad_id is not None:
        wrong &= tokens != pad_id
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f'{file} has {tokens[row, column]} at [{row}, {column}]; expected ids from 0 to '
            f'{vocab_size - 1}, the vocabulary of the model'
        )
    return tokens


def score_tokens(
    score: Callable[[Batch], jax.Array],
    tokens: np.ndarray,
    rows: int,
    pad_id: int | None = None,
) -> np.ndarray:
    """float32 [N, T] of `tokens` [N, T], `rows` at a time; 0 in column 0.

    `score(batch) -> [rows, T]`. What follows a row's last token other than `pad_id` is padding: it
    scores 0. Raises FloatingPointError where a log-probability is not finite.
    """
    N, T = tokens.shape
    logprobs = np.zeros((N, T), np.float32)
    with Progress('score', N) as progress:
        for start in range(0, N, rows):
            part = tokens[start : start + rows]
            batch = _batch(np.pad(part, [(0, rows - len(part)), (0, 0)]), len(part), pad_id)
            found = np.asarray(score(batch))[: len(part)]
            real = batch.segment_ids[: len(part)] > 0
            if not np.isfinite(found[real]).all():
                raise FloatingPointError(
                    f'rows {start} to {start + len(part) - 1} have a log-probability that is not '
                    'finite; the weights are damaged, or too large for this dtype'
                )
            logprobs[start : start + rows] = np.where(real, found, 0.0)
            progress.show(min(start + rows, N))
    return logprobs


def _batch(tokens: np.ndarray, filled: int, pad_id: int | None) -> Batch:
    """A batch of whole rows, of which the first `filled` count."""
    rows, T = tokens.shape
    here = np.arange(T, dtype=np.int32)
    kept = np.ones(tokens.shape, bool) if pad_id is None else tokens != pad_id
    kept[filled:] = False
    lengths = np.where(kept, here + 1, 0).max(axis=1, keepdims=True)
    real = here < lengths
    zeros = np.zeros((rows, T), np.float32)
    return Batch(**dict.fromkeys(Batch._fields, zeros))._replace(
        tokens=np.where(real, tokens, 0).astype(np.int32),
        positions=np.tile(here, (rows, 1)),
        segment_ids=real.astype(np.int32),
        roles=zeros.astype(np.uint8),
    )


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
    if _MODEL.value:
        config = huggingface.read_config(_MODEL.value)
    else:
        work = Workdir.open(_WORKDIR.value)
        config = huggingface.recipe_config(work.config.model)
    config = dataclasses.replace(config, dtype=_DTYPE.value)
    if config.dtype == 'float32':  # an accelerator's default is less
        jax.config.update('jax_default_matmul_precision', 'highest')
    tokens = read_tokens(_TOKENS.value, config.vocab_size, _PAD_ID.value)

    graphdef, abstract = model_params.abstract(config)
    mesh = sharding.make_mesh(ml_collections.ConfigDict(_MESH))
    placed = sharding.param_shardings(abstract, mesh, _RULES)
    if _MODEL.value:
        abstract = jax.tree.map(lambda leaf: leaf.update(dtype=config.dtype), abstract)
        params = huggingface.load_params(_MODEL.value, abstract, placed)
    else:
        checkpointer, step = open_checkpoints(work, _STEP.value)
        wanted = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), abstract, placed)
        params = checkpointer.restore({'params': wanted}, step)[0]['params']
        checkpointer.close()
    rows = -(-_ROWS.value // mesh.size) * mesh.size
    score = jax.jit(
        make_score(graphdef, rows, _TEMPERATURE.value),
        in_shardings=(placed, sharding.batch_sharding(mesh)),
    )
    logprobs = score_tokens(lambda batch: score(params, batch), tokens, rows, _PAD_ID.value)
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
