"""A recipe's step compiled for TPUs that are not there: chips, topologies, memory, cost.

Needs libtpu, which compiles without a TPU. What is compiled here is read, and never run.
"""

import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from jax.experimental import topologies
from jax.extend.core import Jaxpr

from echo_jax.learner import sharding
from echo_jax.learner.step import ShardedModel
from echo_jax.planner import hlo
from echo_jax.planner.hlo import Chip
from echo_jax.types import Batch

# All of these have one device a chip. `Chip` names the pages with these numbers; they list the
# interconnect as 1,600, 4,800 and 3,584 Gbps, of late also as twice that in both directions.
CHIPS = {
    'v5e': Chip(197e12, 819e9, 1600e9 / 8),
    'v5p': Chip(459e12, 2765e9, 4800e9 / 8),
    'v6e': Chip(918e12, 1640e9, 3584e9 / 8),
}


def tpu_devices(topology: str) -> list[jax.Device]:
    """Devices that can be compiled for, but run nothing. Call it before JAX starts a backend.

    Raises ValueError for a topology that does not exist, or of chips that CHIPS lacks, and if there
    is no libtpu.
    """
    if topology.partition(':')[0] not in CHIPS:
        raise ValueError(
            f'topology is {topology!r}; expected one of {", ".join(CHIPS)} and the shape of the '
            'slice, such as v5p:2x2x4, v5e:4x4 or v6e:8x8'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError('no libtpu here, the TPU compiler; pip install "jax[tpu]"')
    # No TPU is looked for, neither here nor on the cloud's metadata server. libtpu warns unless it
    # is told what it runs on; the topology overrules what it is told. Its logs are off, because
    # they go to a folder of /tmp that belongs to the first user of the machine who wrote any.
    os.environ.setdefault('TPU_LOG_DIR', 'disabled')
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1',
        TPU_WORKER_HOSTNAMES='localhost',
        TPU_ACCELERATOR_TYPE='v5p-8',
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',  # nothing is run, so another process may be at it too
    )
    jax.config.update('jax_platforms', 'cpu')
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith('INVALID_ARGUMENT'):
            raise
        raise ValueError(f'the compiler knows no topology {topology!r}: {error}') from error


class OutOfMemory(NamedTuple):
    used: int  # bytes of HBM that would be taken
    limit: int  # bytes of HBM that there are


def read_out_of_memory(message: str) -> OutOfMemory | None:
    """The two numbers of the compiler's message, or None if it speaks of something else."""
    size = r'(\d[\d.]*)([KMGT]?)'
    found = re.search(rf'in memory space hbm. Used {size} of {size}', message) or re.search(
        rf'memory on HBM.*?\({size}\) exceeds available HBM \({size}\)', message, re.DOTALL
    )
    if not found:
        return None
    scale = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
    used, used_unit, limit, limit_unit = found.groups()
    return OutOfMemory(int(float(used) * scale[used_unit]), int(float(limit) * scale[limit_unit]))


def hbm_limit(device: jax.Device) -> int:
    """Bytes of HBM that may be used, read from the compiler's refusal of an array of 1 TiB."""
    huge = jax.ShapeDtypeStruct(
        (2**40,), np.int8, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        refused = read_out_of_memory(str(error))
        if refused:
            return refused.limit
        raise
    raise RuntimeError(f'{device} takes an array of 1 TiB; no limit can be read')


# --------------------------------------------------------------------------- the step, compiled


class Compiled(NamedTuple):
    hbm_bytes: float  # of one chip
    cost: hlo.Cost | None  # of one chip; None if the step does not fit
    seconds: float  # of compilation


class PlannedStep:
    """The recipe's own step on a mesh of `devices`, for a batch of `rows`; it is only compiled."""

    def __init__(self, config: ml_collections.ConfigDict, devices: Sequence[jax.Device], rows: int):
        """Raises ValueError if the batch or the model does not divide over the mesh."""
        if rows % config.batch.micro_rows:
            raise ValueError(
                f'rows={rows} does not divide by batch.micro_rows={config.batch.micro_rows}; '
                'change one of them'
            )
        sharded = ShardedModel.of(config, devices)
        self.config, self.rows, self.mesh = config, rows, sharded.mesh
        self.step, self.state, _ = sharded.step(config.optimizer)

    @property
    def state_bytes(self) -> int:
        """Bytes that the parameters and the optimizer's state take on one chip."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.state)
        )

    def compile(self, env_coef: float, chip: Chip) -> Compiled:
        started = time.monotonic()
        reference = self.state.params if self.config.loss.kl_coef else None
        traced = self.step.trace(self.state, self._batch(), env_coef, reference)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = read_out_of_memory(str(error))
            if refused:
                return Compiled(refused.used, None, time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        memory = compiled.memory_analysis()
        used = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        micro_batches = self.rows // self.config.batch.micro_rows
        cost = hlo.module_cost(
            compiled.as_text(), chip, devices=self.mesh.size, unknown_trips=micro_batches
        )
        kernels = kernel_flops(traced.jaxpr.jaxpr, micro_batches)
        cost += hlo.Cost(flops=kernels, seconds=kernels / chip.peak_flops)
        return Compiled(used, cost, seconds)

    def _batch(self) -> Batch:
        place = sharding.batch_sharding(self.mesh)
        dtypes = {
            **dict.fromkeys(('tokens', 'positions', 'segment_ids'), np.int32),
            'roles': np.uint8,
        }
        shape = self.rows, self.config.batch.seq_len
        return Batch(
            *(
                jax.ShapeDtypeStruct(shape, dtypes.get(name, np.float32), sharding=place)
                for name in Batch._fields
            )
        )


def kernel_flops(jaxpr: Jaxpr, unknown_trips: int) -> float:
    """FLOPs of the matrix products in the Pallas kernels of a traced function.

    A kernel under `shard_map`, the only way that it can be partitioned, is that of one chip. Every
    cell of its grid counts, and the dearer branch of a condition; of splash attention, which skips
    the cells that the causal mask hides, half of them.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        p = equation.params
        if equation.primitive.name == 'pallas_call':
            cells = math.prod(p['grid_mapping'].grid)
            causal = 0.5 if p['name'].startswith('splash') else 1.0
            total += causal * cells * _dot_flops(p['jaxpr'])
            continue
        times = {'scan': p.get('length'), 'while': unknown_trips}.get(equation.primitive.name, 1)
        total += times * sum(kernel_flops(inner, unknown_trips) for inner in _inner(p))
    return total


def _dot_flops(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        p = equation.params
        if equation.primitive.name == 'dot_general':
            (contracted, _), _ = p['dimension_numbers']
            sizes = equation.invars[0].aval.shape
            out = math.prod(equation.outvars[0].aval.shape)
            total += 2.0 * out * math.prod(sizes[i] for i in contracted)
            continue
        inner = [_dot_flops(j) for j in _inner(p)]
        match equation.primitive.name:
            case 'scan':
                total += p['length'] * sum(inner)
            case 'cond':
                total += max(inner, default=0.0)
            case _:
                total += sum(inner)
    return total


def _inner(params: dict) -> list[Jaxpr]:
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: hasattr(x, 'eqns'))
    return [leaf for leaf in leaves if hasattr(leaf, 'eqns')]
