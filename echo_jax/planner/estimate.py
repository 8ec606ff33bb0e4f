"""What a recipe takes: memory, FLOPs and time of its step, and how many rollouts a GPU holds.

Nothing is trained or started. The compiler says what memory the step takes; the rest is estimated.
What `eval.balance` measures beside some steps takes one gradient more, and is left out.

Time is a roofline, so it is optimistic. Each instruction of the compiled schedule, loops counted,
takes the longest of three: its matrix products at the chip's peak; its operands and results once
through the HBM; what it sends, at the interconnect's rate with all links of the chip busy.
Collectives that run beside the schedule count only if together they take longer than it does. The
matrix products of Pallas kernels are added at peak. Recomputed layers count as often as they run,
and every row is taken to be full, of one sequence. Left out are work of the vector units (norms,
softmax), what a product reads more than once, pipeline fill, latency and contention of the
interconnect, the data-center network, the host, and everything outside the step (sampling,
publishing, checkpoints).

`model_flops_per_step` is what the mathematics asks for, however much is computed again, and without
the scoring of old log-probabilities: 6 P T for
the P parameters that multiply (all but norms and the lookup of an untied embedding) and the T
tokens, and 6 L N H S^2 for the causal attention of each row of S tokens, with L layers of N heads
of H. `estimated_mfu` is that over the estimated seconds at the peak of all chips.

The rollout side is arithmetic: bfloat16 weights, keys and values of a whole rollout, and how many
rollouts one GPU holds at once. It leaves out activations, CUDA graphs, and what prefix caching
saves.
"""

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections

from echo_jax.learner.sharding import MESH_AXES
from echo_jax.learner.updates import scores_before, updates_of_step
from echo_jax.model import huggingface
from echo_jax.model.family import ModelConfig, count_params
from echo_jax.planner.topology import CHIPS, Compiled, PlannedStep, TooLarge

GIB = 2**30
# Bytes of memory, as the vendor's data sheets count them, in powers of ten.
GPUS = {'H100': 80e9, 'H200': 141e9, 'A100': 80e9, 'L4': 24e9, 'B200': 192e9}
# Parameters and AdamW's two moments are 3 float32 numbers each; their gradients are a 4th.
_WITH_GRADIENTS = 4 / 3


def model_flops(c: ModelConfig, rows: int, seq_len: int) -> float:
    """FLOPs of one step, forward and backward, if nothing is computed twice; see the module's text.

    A parameter that multiplies costs a token 2 FLOPs forward and 4 backward. A score and its part
    of the mixture cost 4 H FLOPs forward and 8 H backward, and causality leaves half of S^2.
    """
    sizes, (_, multiply) = c.axis_sizes(), count_params(c)
    attention = 6 * sizes['layers'] * sizes['heads'] * seq_len**2
    return float(rows * (6 * multiply * seq_len + attention))


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    devices: Sequence[jax.Device],
    limit: int,
    rows: int,
    compare: bool = True,
) -> dict:
    """What a step of `rows` rows takes; `compare` compiles it once more, without ECHO's term.

    If a step has several updates, one is compiled, for the rows of a mini-batch, and counts as
    often as there are updates; so is the scoring pass before the first, if the recipe has one.

    `fits` is the compiler's verdict. If it is False, what only a compiled step has is None, and
    `hint` says what could be done. Raises ValueError if the sizes do not divide.
    """
    chip, model = CHIPS[topology.partition(':')[0]], huggingface.recipe_config(config.model)
    if rows % config.batch.updates:
        raise ValueError(
            f'rows={rows} does not divide by batch.updates={config.batch.updates}; change one'
        )
    step = PlannedStep(config, devices, rows // config.batch.updates)
    env_coef, updates = config.loss.env_coef, updates_of_step(config)
    echo = step.compile(env_coef, chip)
    needed = config.batch.epochs * model_flops(model, rows, config.batch.seq_len)
    found: dict[str, Any] = {
        'topology': topology,
        'chips': len(devices),
        'mesh': dict(step.mesh.shape),
        'rows': rows,
        'micro_rows': config.batch.micro_rows,
        'seq_len': config.batch.seq_len,
        'updates_per_step': updates,
        'params': count_params(model)[0],
        'hbm_gib_per_chip': echo.hbm_bytes / GIB,
        'hbm_limit_gib': limit / GIB,
        'fits': isinstance(echo, Compiled),
        'hint': None,
        'state_gib_per_chip': step.state_bytes / GIB,
        'tokens_per_step': rows * config.batch.seq_len,
        'model_flops_per_step': needed,
        'hardware_flops_per_step': None,
        'estimated_step_seconds': None,
        'estimated_mfu': None,
        'hbm_traffic_gib_per_step': None,
        'collective_gib_per_step': None,
        'compile_seconds': echo.seconds,
        'echo_over_grpo_flops': None,
        'echo_over_grpo_hbm': None,
    }
    if isinstance(echo, TooLarge):
        return found | {'hint': hint(step, echo.hbm_bytes, limit)}
    cost = echo.cost * updates
    if scores_before(config):
        cost += step.scoring_cost(chip) * config.batch.updates
    seconds = max(cost.seconds, cost.sent_bytes / chip.ici_bandwidth)
    found |= {
        'hardware_flops_per_step': len(devices) * cost.flops,
        'estimated_step_seconds': seconds,
        'estimated_mfu': needed / (seconds * len(devices) * chip.peak_flops),
        'hbm_traffic_gib_per_step': cost.hbm_bytes / GIB,
        'collective_gib_per_step': cost.sent_bytes / GIB,
    }
    if compare and env_coef:
        grpo = step.compile(0.0, chip)
        found['echo_over_grpo_hbm'] = echo.hbm_bytes / grpo.hbm_bytes
        if isinstance(grpo, Compiled):
            found['echo_over_grpo_flops'] = echo.cost.flops / grpo.cost.flops
    return found


def hint(step: PlannedStep, used: float, limit: int) -> str:
    """Says what could make a step fit that takes `used` bytes of a chip, more than `limit`."""
    sizes, micro_rows = step.mesh.shape, step.config.batch.micro_rows
    over = f'{(used - limit) / GIB:.1f} GiB a chip too much'
    kept = _WITH_GRADIENTS * step.state_bytes
    if kept > limit:
        chips = -(-step.mesh.size * kept // limit)
        return (
            f'{over}: parameters, optimizer and gradients alone take {kept / GIB:.1f} GiB; take '
            f'{chips:.0f} chips or more, and spread the parameters over all of them (fsdp)'
        )
    ways, tries = sizes['data'] * sizes['fsdp'], []
    if micro_rows > ways:
        tries.append(f'batch.micro_rows={ways}')
    if sizes['fsdp'] % 2 == 0:  # two chips then share the tokens of a row
        halved = dict(sizes) | {'fsdp': sizes['fsdp'] // 2, 'context': 2 * sizes['context']}
        tries.append(f'--mesh={_mesh_text(halved)} with batch.micro_rows={ways // 2}')
    return f'{over}: try {", or ".join([*tries, "more chips"])}; --search tries meshes'


# ------------------------------------------------------------------------------ the rollout side


def rollout_plan(config: ml_collections.ConfigDict, gpu: str) -> dict:
    """How large a version of the weights is, and how many rollouts a GPU holds beside it."""
    if gpu not in GPUS:
        raise ValueError(f'gpu is {gpu!r}; expected one of {", ".join(GPUS)}')
    model = huggingface.recipe_config(config.model)
    utilization = config.policy.gpu_memory_utilization
    sizes = model.axis_sizes()
    weights = 2 * count_params(model)[0]
    per_token = 2 * 2 * sizes['layers'] * sizes['kv_heads']  # a key and a value, bfloat16
    per_rollout = per_token * config.protocol.max_total_tokens
    free = GPUS[gpu] * utilization - weights
    return {
        'gpu': gpu,
        'gpu_memory_gib': GPUS[gpu] / GIB,
        'gpu_memory_utilization': utilization,
        'weight_gib_per_version': weights / GIB,
        'kv_kib_per_token': per_token / 2**10,
        'kv_gib_per_rollout': per_rollout / GIB,
        'rollouts_at_once': max(0, int(free // per_rollout)),
    }


# --------------------------------------------------------------------------------------- search


def candidates(
    config: ml_collections.ConfigDict, chips: int, rows: int
) -> Iterator[tuple[dict[str, int], list[int]]]:
    """Yields the meshes that divide, those that split least first, each with its micro-batch sizes.

    Splitting the tokens or the heads costs communication in every layer that fsdp alone does not.
    """
    model = huggingface.recipe_config(config.model)
    powers = [2**n for n in range(chips.bit_length())]
    for tensor, context in sorted(
        itertools.product(powers, powers), key=lambda p: (p[0] * p[1], p)
    ):
        if chips % (tensor * context) or model.num_key_value_heads % tensor:
            continue
        ways = chips // (tensor * context)
        sizes = [ways * n for n in (1, 2, 4, 8) if rows % (ways * n) == 0]
        if config.batch.seq_len % context == 0 and sizes:
            yield {'data': 1, 'fsdp': ways, 'context': context, 'tensor': tensor}, sizes


def search(
    config: ml_collections.ConfigDict,
    topology: str,
    devices: Sequence[jax.Device],
    limit: int,
    rows: int,
    compiles: int,
) -> list[dict]:
    """The plans of at most `compiles` candidates: those that fit, fastest first, then the rest.

    Prints a line on stderr for each as soon as it is made. Raises ValueError if none divides.
    """
    found = []
    for mesh, sizes in candidates(config, len(devices), rows):
        for micro_rows in sizes:
            if len(found) == compiles:
                break
            config = config.copy_and_resolve_references()
            config.mesh.update(mesh)
            config.batch.micro_rows = micro_rows
            try:
                found.append(plan(config, topology, devices, limit, rows, compare=False))
            except ValueError as error:  # the model or its sharding refuses this mesh
                print(f'{_mesh_text(mesh)}: {error}', file=sys.stderr, flush=True)
                break
            print(plan_line(found[-1]), file=sys.stderr, flush=True)
            if not found[-1]['fits']:  # nor will more rows at a time
                break
    if not found:
        raise ValueError(
            f'{rows} rows of {config.batch.seq_len} tokens divide over no mesh of {len(devices)} '
            'chips; give --rows, --seq_len or another --topology'
        )
    fitting = [p for p in found if p['fits']]
    return [
        *sorted(fitting, key=lambda p: p['estimated_step_seconds']),
        *sorted((p for p in found if not p['fits']), key=lambda p: p['hbm_gib_per_chip']),
    ]


def _mesh_text(sizes: dict[str, int]) -> str:
    return ','.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1) or 'fsdp=1'


def plan_line(p: dict) -> str:
    """One line of text for a plan that `search` found."""
    head = f'{_mesh_text(p["mesh"])} micro_rows={p["micro_rows"]}: {p["hbm_gib_per_chip"]:.1f} GiB'
    if not p['fits']:
        return f'{head}, does not fit {p["hbm_limit_gib"]:.1f}'
    return f'{head}, {p["estimated_step_seconds"]:.2f} s, MFU {p["estimated_mfu"]:.2f}'


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes of all axes for a text such as 'fsdp=8,context=2'; an axis not in it is 1."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(','):
        axis, _, size = part.partition('=')
        if axis not in sizes or not re.fullmatch(r'-1|[1-9]\d*', size):
            raise ValueError(
                f'--mesh={text}: {part!r} is no axis and size; expected such as fsdp=8,context=2, '
                f'axes {", ".join(MESH_AXES)}'
            )
        sizes[axis] = int(size)
    return sizes
