"""The program of one rollout worker: it draws the groups that are due and writes them.

    python -m echo_jax.worker --config=configs/qwen3_8b.py --workdir=RUN

It runs beside the learner or on machines of its own, without JAX: vLLM samples with the weights
that the learner publishes, and commands run in sandboxes. Any number of workers may run, join and
leave: each claims groups, and those of one that has died go to the others (`policy.lease_sec`). On
a Ray cluster launch/ray starts them instead. A group is written when all of its rollouts have
ended, and one that is in the store is not drawn again.
"""

from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from echo_jax.policy import PolicyError
from echo_jax.run import entry
from echo_jax.run.rollout_worker import check_config, start
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.claims import NameTaken

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, "Folder or gs:// URL of the run, the learner's.", required=True
)
_NAME = flags.DEFINE_string('name', '', 'Of this worker alone; empty: its host and a number.')
_MEMORY = flags.DEFINE_float(
    'gpu_memory_utilization', None, "Share of a GPU's memory, in place of the recipe's."
)
_PARALLEL = flags.DEFINE_integer(
    'tensor_parallel', None, "GPUs of the engine, in place of the recipe's."
)
flags.mark_flag_as_required('config')


def main(argv: Sequence[str]) -> None:
    del argv
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    check_config(config, entry.overrides())
    here = {'gpu_memory_utilization': _MEMORY.value, 'tensor_parallel_size': _PARALLEL.value}
    engine = {key: value for key, value in here.items() if value is not None}

    async def work():
        worker = await start(config, _WORKDIR.value, _NAME.value, **engine)
        try:
            await worker.serve()
        finally:
            await worker.close()

    sandbox_maker(config).close()  # fails now if this machine allows no sandbox
    entry.Stop().run(work())


if __name__ == '__main__':
    entry.run(main, PolicyError, NameTaken)
