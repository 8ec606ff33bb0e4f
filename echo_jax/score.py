"""Per-token log-probabilities of given tokens under a model directory or a run's checkpoint.

    python -m echo_jax.score --model=HF_DIR --tokens=tokens.npy --output=logprobs.npy
    python -m echo_jax.score --workdir=runs/tiny --step=80 --tokens=tokens.npy --output=logprobs.npy

tokens.npy is [N, T] of integers; logprobs.npy is float32 [N, T], nats: a token's log-probability
given those before it in its row, divided by --temperature in the logits. Column 0 is 0. It computes
on all devices of one host and knows nothing of roles, rewards and losses.
"""

import functools
import pathlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.learner.step import ShardedModel
from echo_jax.run import entry
from echo_jax.run.scoring import check_tokens, load_params, read_tokens, score_tokens
from echo_jax.run.workdir import Workdir

_MODEL = flags.DEFINE_string('model', '', 'Hugging Face directory.')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Run, instead of --model.')
_STEP = flags.DEFINE_integer('step', None, 'Saved step of the run; none: the last.')
_TOKENS = flags.DEFINE_string('tokens', None, '.npy of integers [N, T].', required=True)
_OUTPUT = flags.DEFINE_string('output', None, '.npy to write, float32 [N, T].', required=True)
_TEMPERATURE = flags.DEFINE_float('temperature', 1.0, 'What the logits are divided by.')
_PAD_ID = flags.DEFINE_integer('pad_id', None, 'Id that rows are filled up with at their end.')
_ROWS = flags.DEFINE_integer('rows', 8, 'Rows at a time.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'To compute in.')


def _config(model: dict, rows: int, length: int, dtype: str) -> ml_collections.ConfigDict:
    """A config that splits rows, and the parameters along 'embed', over all devices."""
    # The attention kernels of accelerators multiply in less than float32.
    attention = 'blocks' if dtype == 'float32' else 'auto'
    return ml_collections.ConfigDict(
        {
            'model': model | {'dtype': dtype, 'attention': attention},
            'mesh': {'data': 1, 'fsdp': -1, 'context': 1, 'tensor': 1},
            'sharding': {'embed': 'fsdp'},
            'batch': {'micro_rows': rows, 'seq_len': length},
        }
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
    work = Workdir.open(_WORKDIR.value) if _WORKDIR.value else None
    settings = work.config.model.to_dict() if work else {'path': _MODEL.value}
    tokens = read_tokens(_TOKENS.value)

    if _DTYPE.value == 'float32':  # the default of an accelerator is less precise
        jax.config.update('jax_default_matmul_precision', 'highest')
    devices = jax.device_count()
    rows = -(-_ROWS.value // devices) * devices
    # The attention kernels of accelerators take rows in blocks of 128 tokens.
    block = 1 if jax.default_backend() == 'cpu' else 128
    length = -(-tokens.shape[1] // block) * block
    model = ShardedModel.of(_config(settings, rows, length, _DTYPE.value))
    check_tokens(tokens, model.model.vocab_size, _PAD_ID.value)
    params = load_params(model, work, _STEP.value)
    score = functools.partial(model.score(_TEMPERATURE.value), params)
    logprobs = score_tokens(score, tokens, rows, length, _PAD_ID.value)
    partial = output.with_name(output.name + '.partial')
    with partial.open('wb') as file:
        np.save(file, logprobs)
    partial.rename(output)


if __name__ == '__main__':
    entry.run(main, CheckpointError)
