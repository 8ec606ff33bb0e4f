"""A run's checkpoint as a Hugging Face directory that transformers and vLLM load.

    python -m echo_jax.export --workdir=runs/tiny --output=models/tiny

Only the parameters are read, one array at a time: the host needs memory for the largest. It runs
beside the learner too, and on one host, which must reach the checkpoint whole.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
from absl import flags, logging
from flax import nnx

from echo_jax import program
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError, is_there
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.report import CONSOLE, Progress
from echo_jax.workdir import Workdir

DTYPES = ('bfloat16', 'float16', 'float32')


def open_checkpoints(work: Workdir, step: int | None) -> tuple[Checkpointer, int]:
    """The run's checkpoints, to read, and `step` or the last of them; ValueError without any."""
    folder = work.url('checkpoints', 'train')
    checkpointer = Checkpointer(folder, read_only=True) if is_there(folder) else None
    latest = checkpointer.latest() if checkpointer else None
    if latest is None:
        raise ValueError(
            f'{work.url()} has saved no checkpoint yet; run echo_jax.train on it first'
        )
    return checkpointer, latest if step is None else step


def saved_params(
    checkpointer: Checkpointer, abstract: nnx.State, step: int
) -> Iterator[tuple[str, jax.Array]]:
    """Flat name and array of every parameter of a checkpoint, read as they are asked for."""
    leaves = nnx.to_flat_state(abstract)
    with Progress('arrays', len(leaves)) as progress:
        for done, (path, leaf) in enumerate(leaves, start=1):
            one = nnx.from_flat_state([(path, leaf)])
            state, _, _ = checkpointer.restore({'params': one}, step, partial=True)
            yield from model_params.flatten(state['params']).items()
            progress.show(done)


def export(work: Workdir, step: int | None, output: str, dtype: str, shard_bytes: int) -> int:
    """Writes the directory, in what the run computes in unless `dtype` is given; its step."""
    path = work.config.model.path
    config = huggingface.recipe_config(work.config.model)
    _, abstract = model_params.abstract(config)
    checkpointer, step = open_checkpoints(work, step)
    generation = pathlib.Path(path) / 'generation_config.json'
    huggingface.write_model(
        output,
        saved_params(checkpointer, abstract, step),
        config,
        work.tokenizer(),
        dtype=dtype or config.dtype,
        shard_bytes=shard_bytes,
        generation_config=json.loads(generation.read_text())
        if path and generation.exists()
        else None,
    )
    checkpointer.close()
    return step


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    work = Workdir.open(_WORKDIR.value)
    step = export(work, _STEP.value, _OUTPUT.value, _DTYPE.value, _SHARD_BYTES.value)
    size = sum(file.stat().st_size for file in pathlib.Path(_OUTPUT.value).iterdir())
    CONSOLE.print(f'step {step} of {work.url()}: {size:,} bytes in {_OUTPUT.value}')


if __name__ == '__main__':
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder or gs:// URL of the run.')
    _STEP = flags.DEFINE_integer('step', None, 'Saved step; none: the last.')
    _OUTPUT = flags.DEFINE_string('output', None, 'Directory to make.')
    _DTYPE = flags.DEFINE_enum(
        'dtype', '', ['', *DTYPES], "Of the tensors; empty: the run's model.dtype."
    )
    _SHARD_BYTES = flags.DEFINE_integer(
        'shard_bytes', huggingface.SHARD_BYTES, 'Most bytes of one file.', lower_bound=1
    )
    flags.mark_flags_as_required(['workdir', 'output'])
    program.run(main, CheckpointError)
