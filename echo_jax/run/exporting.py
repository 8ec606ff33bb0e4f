"""Writes a run's saved parameters as a Hugging Face directory, one array at a time."""

import json
import pathlib
from collections.abc import Iterator

import jax
from flax import nnx

from echo_jax.learner.checkpoint import Checkpointer, open_saved
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.run.report import Progress
from echo_jax.run.workdir import Workdir


def saved_params(
    checkpointer: Checkpointer, abstract: nnx.State, step: int
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the flat name and array of every parameter of a checkpoint; reads one at a time."""
    leaves = nnx.to_flat_state(abstract)
    with Progress('arrays', len(leaves)) as progress:
        for done, (path, leaf) in enumerate(leaves, start=1):
            one = nnx.from_flat_state([(path, leaf)])
            state, _, _ = checkpointer.restore({'params': one}, step, partial=True)
            yield from model_params.flatten(state['params']).items()
            progress.show(done)


def export_run(work: Workdir, step: int | None, output: str, dtype: str, shard_bytes: int) -> int:
    """Writes the model directory `output` and returns the step that was written.

    step: a saved step, or None for the last one.
    dtype: what the tensors are written as; '' stands for the run's `model.dtype`.
    shard_bytes: as many bytes of tensors as a file may hold.
    """
    path = work.config.model.path
    config = huggingface.recipe_config(work.config.model)
    _, abstract = model_params.abstract(config)
    checkpointer, step = open_saved(work.url('checkpoints', 'train'), step)
    file = pathlib.Path(path, 'generation_config.json')
    generation = json.loads(file.read_text()) if path and file.exists() else None
    huggingface.write_model(
        output,
        saved_params(checkpointer, abstract, step),
        config,
        work.tokenizer(),
        dtype=dtype or config.dtype,
        shard_bytes=shard_bytes,
        generation_config=generation,
    )
    checkpointer.close()
    return step
