"""Compiles a recipe's step for TPUs that this machine does not have, to read its memory and cost.

It needs libtpu, which compiles without a TPU. Nothing that is compiled here is ever run.
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
from jax.core import ShapedArray
from jax.experimental import topologies
from jax.extend.core import Jaxpr, jaxprs_in_params

from echo_jax.learner.batching import padding
from echo_jax.learner.sharding import batch_sharding
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

    Raises ValueError if there is no libtpu, no such topology, or if CHIPS lacks its kind of chip.
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
    """What the compiler says when a step needs more HBM than a chip has."""

    used: int  # bytes of HBM that the step needs
    limit: int  # bytes of HBM that may be used


def read_out_of_memory(message: str) -> OutOfMemory | None:
    """The two numbers of the compiler's message, or None if it is about something else."""
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
    """A step that fits; its memory and cost are those of one chip."""

    hbm_bytes: float
    seconds: float  # of compilation
    cost: hlo.Cost


class TooLarge(NamedTuple):
    """A step that the compiler refuses, because it does not fit a chip's HBM."""

    hbm_bytes: float  # that it would take of one chip
    seconds: float  # until the compiler refused


class PlannedStep:
    """The step that the recipe trains with, for a batch of `rows` rows on a mesh of `devices`."""

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
        self.score = sharded.score_in_place(config.policy.temperature)

    @property
    def state_bytes(self) -> int:
        """Bytes that the parameters and the optimizer's state take on one chip."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.state)
        )

    def compile(self, env_coef: float, chip: Chip) -> Compiled | TooLarge:
        """Compiles the step; `env_coef` 0 leaves ECHO's term out of it."""
        started = time.monotonic()
        reference = self.state.params if self.config.loss.kl_coef else None
        traced = self.step.trace(self.state, self._batch(), env_coef, reference)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            refused = read_out_of_memory(str(error))
            if refused:
                return TooLarge(refused.used, time.monotonic() - started)
            raise
        seconds = time.monotonic() - started
        memory = compiled.memory_analysis()
        if memory is None:
            raise RuntimeError('the compiler does not show the memory of what it has compiled')
        used = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        return Compiled(used, seconds, self._cost(traced, compiled, chip))

    def scoring_cost(self, chip: Chip) -> hlo.Cost:
        """The cost of the pass that finds the old log-probabilities of such a batch.

        It takes less memory than the step, which has a forward pass too and gradients beside it.
        """
        traced = self.score.trace(self.state.params, self._batch())
        return self._cost(traced, traced.lower().compile(), chip)

    def _batch(self) -> Batch:
        zeros, place = padding(self.rows, self.config.batch.seq_len), batch_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), zeros)

    def _cost(
        self, traced: jax.stages.Traced, compiled: jax.stages.Compiled, chip: Chip
    ) -> hlo.Cost:
        text = compiled.as_text()
        if text is None:
            raise RuntimeError('the compiler does not show the text of what it has compiled')
        micro_batches = self.rows // self.config.batch.micro_rows
        cost = hlo.module_cost(text, chip, devices=self.mesh.size, unknown_trips=micro_batches)
        kernels = kernel_flops(traced.jaxpr.jaxpr, micro_batches)
        return cost + hlo.Cost(kernels, seconds=kernels / chip.peak_flops)


def kernel_flops(jaxpr: Jaxpr, unknown_trips: int, in_kernel: bool = False) -> float:
    """FLOPs of the matrix products in the Pallas kernels of a traced function.

    A kernel under `shard_map`, the only way that it can be partitioned, is that of one chip. Every
    cell of its grid is counted, but only half of them for splash attention, which skips the cells
    that the causal mask hides. Of a condition the dearer branch is counted. A loop whose length is
    not written down runs `unknown_trips` times. `in_kernel` says that `jaxpr` is a kernel's body.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        p = equation.params
        inner = [kernel_flops(j, unknown_trips, in_kernel) for j in jaxprs_in_params(p)]
        match equation.primitive.name:
            case 'pallas_call':
                causal = 0.5 if p['name'].startswith('splash') else 1.0
                cells = math.prod(p['grid_mapping'].grid)
                total += causal * cells * kernel_flops(p['jaxpr'], 1, in_kernel=True)
            case 'dot_general' if in_kernel:
                (contracted, _), _ = p['dimension_numbers']
                avals = equation.invars[0].aval, equation.outvars[0].aval
                lhs, out = (aval.shape for aval in avals if isinstance(aval, ShapedArray))
                total += 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
            case 'scan':
                total += p['length'] * sum(inner)
            case 'while':
                total += unknown_trips * sum(inner)
            case 'cond':
                total += max(inner, default=0.0)
            case _:
                total += sum(inner)
    return total
