"""Says what a recipe takes on a TPU topology, by compiling its real step for it, without a TPU.

    python -m echo_jax.plan --config=configs/qwen3_8b.py --topology=v5p:2x2x4 --json
    python -m echo_jax.plan --config=configs/qwen3_8b.py --topology=v5e:8x8 --search

It needs libtpu, the compiler (`pip install "jax[tpu]"`), which says how much memory arguments,
temporaries and code take on one chip, and how much there is. planner/estimate.py says how the time
is estimated. Nothing is trained.
"""

import json
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

from echo_jax.learner.batching import batch_rows
from echo_jax.planner.estimate import GPUS, mesh_sizes, plan, plan_line, rollout_plan, search
from echo_jax.planner.topology import hbm_limit, tpu_devices
from echo_jax.run import entry
from echo_jax.run.inert import check_inert

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'Chips and shape, such as v5p:2x2x4.', required=True
)
_ROWS = flags.DEFINE_integer('rows', None, "Rows of a batch, if not the recipe's.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer('seq_len', None, "A row's, if not the recipe's.", lower_bound=1)
_MESH = flags.DEFINE_string('mesh', None, "Such as fsdp=8,context=2, if not the recipe's.")
_GPU = flags.DEFINE_string('gpu', 'H100', f'GPU of the rollout workers: {", ".join(GPUS)}.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON line instead of a table.')
_COMPARE = flags.DEFINE_bool('compare', True, 'Compile the step without the ECHO term too.')
_SEARCH = flags.DEFINE_bool('search', False, 'Try meshes and micro-batch sizes, and rank them.')
_SEARCH_LIMIT = flags.DEFINE_integer('search_limit', 8, 'Compilations at most.', lower_bound=1)
flags.mark_flag_as_required('config')


def _table(values: dict) -> str:
    def text(value):
        if isinstance(value, float):
            return f'{value:.4g}'
        if isinstance(value, dict):
            return ', '.join(f'{k}={text(v)}' for k, v in value.items())
        return f'{value:,}' if type(value) is int else str(value)

    return '\n'.join(f'{name:28}{text(v)}' for name, v in values.items() if v is not None)


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)
    config = _CONFIG.value.copy_and_resolve_references()
    check_inert(config, entry.overrides())
    if _MESH.value:
        config.mesh.update(mesh_sizes(_MESH.value))
    config.batch.seq_len = _SEQ_LEN.value or config.batch.seq_len
    rows = _ROWS.value or config.batch.updates * batch_rows(config, config.batch.updates)
    gpu = rollout_plan(config, _GPU.value)  # fails at once if there is no such GPU
    devices = tpu_devices(_TOPOLOGY.value)
    where = _TOPOLOGY.value, devices, hbm_limit(devices[0]), rows
    if _SEARCH.value:
        plans = search(config, *where, _SEARCH_LIMIT.value)
        print(json.dumps(plans) if _JSON.value else '\n'.join(map(plan_line, plans)))
        return
    made = plan(config, *where, compare=_COMPARE.value)
    print(json.dumps(made | {'rollout': gpu}) if _JSON.value else _table(made | gpu))


if __name__ == '__main__':
    entry.run(main)
