"""A run's checkpoint as a Hugging Face directory that transformers and vLLM load.

    python -m echo_jax.export --workdir=runs/tiny --output=models/tiny

Only the parameters are read, one array at a time: the host needs memory for the largest. It runs
beside the learner too, and on one host, which must reach the checkpoint whole.
"""

import pathlib
from collections.abc import Sequence

from absl import flags, logging

from echo_jax.learner.checkpoint import CheckpointError
from echo_jax.model import huggingface
from echo_jax.run import entry
from echo_jax.run.exporting import export_run
from echo_jax.run.report import CONSOLE
from echo_jax.run.workdir import Workdir

DTYPES = ('bfloat16', 'float16', 'float32')

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder or gs:// URL of the run.', required=True)
_STEP = flags.DEFINE_integer('step', None, 'Saved step; none: the last.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory to make.', required=True)
_DTYPE = flags.DEFINE_enum(
    'dtype', '', ['', *DTYPES], "Of the tensors; empty: the run's model.dtype."
)
_SHARD_BYTES = flags.DEFINE_integer(
    'shard_bytes', huggingface.SHARD_BYTES, 'Most bytes of one file.', lower_bound=1
)


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    work = Workdir.open(_WORKDIR.value)
    step = export_run(work, _STEP.value, _OUTPUT.value, _DTYPE.value, _SHARD_BYTES.value)
    size = sum(file.stat().st_size for file in pathlib.Path(_OUTPUT.value).iterdir())
    CONSOLE.print(f'step {step} of {work.url()}: {size:,} bytes in {_OUTPUT.value}')


if __name__ == '__main__':
    entry.run(main, CheckpointError)
