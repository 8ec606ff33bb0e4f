"""Memory, FLOPs and time of a recipe's step on a topology, and how many rollouts a GPU holds.

How time is estimated: a roofline, so optimistic. Each instruction of the compiled schedule, loops
counted, takes the longest of its matrix products at the chip's peak, its operands and results once
through the HBM, and what it sends at the interconnect's rate with all links of the chip busy;
collectives that run beside the schedule count where all of them together take longer. The matrix
products of Pallas kernels are added at peak. Recomputed layers count as often as they run; every
row is taken to be full, of one sequence. Left out: work of the vector units (norms, softmax), what
a product reads more than once, pipeline fill, latency and contention of the interconnect, the
data-center network, the host, and everything outside the step (sampling, publishing, checkpoints).

`model_flops_per_step` is what the mathematics asks for, whatever is computed again: 6 P T of the P
parameters that multiply (all but norms and the lookup of an untied embedding) and the T tokens,
and 6 L N H S^2 a row of S tokens for causal attention. `estimated_mfu` is that over the estimated
seconds at the peak of all chips.

The rollout side is arithmetic: bfloat16 weights, keys and values of a whole rollout, and how many
rollouts one GPU holds at once. It leaves out activations, CUDA graphs, and what prefix caching
saves. Nothing is trained or started.
"""

import itertools
import re
import sys
from collections.abc import Iterator, Sequence

import jax
import ml_collections

from echo_jax.learner.sharding import MESH_AXES
from echo_jax.model import huggingface
from echo_jax.model.qwen3 import Qwen3Config
from echo_jax.planner.topology import CHIPS, Step

GIB = 2**30
# Bytes of memory, as the vendor's data sheets count them, in powers of ten.
GPUS = {'H100': 80e9, 'H200': 141e9, 'A100': 80e9, 'L4': 24e9, 'B200': 192e9}
_GRADIENTS = 4 / 3  # state and the summed gradients, to state: float32 of AdamW's 3 and 1 more


def parameters(c: Qwen3Config) -> tuple[int, int]:
    """How many there are, and how many of them multiply: no norm, no lookup of an untied table."""
    D, H, L = c.hidden_size, c.head_dim, c.num_hidden_layers
    attention = 2 * D * H * (c.num_attention_heads + c.num_key_value_heads)
    table = c.vocab_size * D
    multiply = L * (attention + 3 * D * c.intermediate_size) + table
    norms = L * (2 * D + 2 * H) + D
    return multiply + norms + (0 if c.tie_word_embeddings else table), multiply


def model_flops(c: Qwen3Config, rows: int, seq_len: int) -> float:
    """Of one step, forward and backward, nothing computed twice; see the module's docstring."""
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seq_len**2
    return float(rows * (6 * parameters(c)[1] * seq_len + attention))


def plan(
    config: ml_collections.ConfigDict,
    topology: str,
    devices: Sequence[jax.Device],
    limit: int,
    rows: int,
    compare: bool = True,
) -> dict:
    """What a step of `rows` rows takes; `compare` compiles it once more, without ECHO's term.

    `fits` is the compiler's verdict; where it is False, what only a compiled program has is None
    and `hint` says what could be done. Raises ValueError where the sizes do not divide.
    """
    chip, model = CHIPS[topology.partition(':')[0]], huggingface.recipe_config(config.model)
    step = Step(config, devices, rows)
    env_coef = config.loss.env_coef
    echo = step.compile(env_coef, chip)
    fits, cost = echo.cost is not None, echo.cost
    needed = model_flops(model, rows, config.batch.seq_len)
    seconds = fits and max(cost.seconds, cost.sent_bytes / chip.ici_bandwidth)
    grpo = step.compile(0.0, chip) if compare and fits and env_coef else None
    return {
        'topology': topology,
        'chips': len(devices),
        'mesh': dict(step.mesh.shape),
        'rows': rows,
        'micro_rows': config.batch.micro_rows,
        'seq_len': config.batch.seq_len,
        'params': parameters(model)[0],
        'hbm_gib_per_chip': echo.hbm_bytes / GIB,
        'hbm_limit_gib': limit / GIB,
        'fits': fits,
        'hint': None if fits else hint(step, echo.hbm_bytes, limit),
        'state_gib_per_chip': step.state_bytes / GIB,
        'tokens_per_step': rows * config.batch.seq_len,
        'model_flops_per_step': needed,
        'hardware_flops_per_step': len(devices) * cost.flops if fits else None,
        'estimated_step_seconds': seconds if fits else None,
        'estimated_mfu': needed / (seconds * len(devices) * chip.peak_flops) if fits else None,
        'hbm_traffic_gib_per_step': cost.hbm_bytes / GIB if fits else None,
        'collective_gib_per_step': cost.sent_bytes / GIB if fits else None,
        'compile_seconds': echo.seconds,
        'echo_over_grpo_flops': cost.flops / grpo.cost.flops if grpo and grpo.cost else None,
        'echo_over_grpo_hbm': echo.hbm_bytes / grpo.hbm_bytes if grpo else None,
    }


def hint(step: Step, used: float, limit: int) -> str:
    """What would make a step fit that does not, in words."""
    sizes, micro_rows = step.mesh.shape, step.config.batch.micro_rows
    over = f'{(used - limit) / GIB:.1f} GiB a chip too much'
    kept = _GRADIENTS * step.state_bytes
    if kept > limit:
        chips = -(-step.mesh.size * kept // limit)
        return (
            f'{over}: parameters, optimizer and gradients alone take {kept / GIB:.1f} GiB; take '
            f'{chips:.0f} chips or more, and spread the parameters over all of them (fsdp)'
        )
    ways, tries = sizes['data'] * sizes['fsdp'], []
    if micro_rows > ways:
        tries.append(f'batch.micro_rows={ways}')
    if sizes['fsdp'] % 2 == 0:  # half a row on each chip
        halved = dict(sizes) | {'fsdp': sizes['fsdp'] // 2, 'context': 2 * sizes['context']}
        tries.append(f'--mesh={_mesh_text(halved)} with batch.micro_rows={ways // 2}')
    return f'{over}: try {", or ".join([*tries, "more chips"])}; --search tries meshes'


# ------------------------------------------------------------------------------ the rollout side


def rollout_plan(config: ml_collections.ConfigDict, gpu: str) -> dict:
    """What a version of the weights weighs, and how many rollouts one GPU holds beside them."""
    if gpu not in GPUS:
        raise ValueError(f'gpu is {gpu!r}; expected one of {", ".join(GPUS)}')
    model = huggingface.recipe_config(config.model)
    utilization = config.policy.gpu_memory_utilization
    weights = 2 * parameters(model)[0]
    per_token = 2 * 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
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
    """(mesh, micro-batch sizes from the smallest) that divide; the least split heads come first."""
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

    Each is a line on stderr when it is made. Raises ValueError where no candidate divides.
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
    head = f'{_mesh_text(p["mesh"])} micro_rows={p["micro_rows"]}: {p["hbm_gib_per_chip"]:.1f} GiB'
    if not p['fits']:
        return f'{head}, does not fit {p["hbm_limit_gib"]:.1f}'
    return f'{head}, {p["estimated_step_seconds"]:.2f} s, MFU {p["estimated_mfu"]:.2f}'


def mesh_sizes(text: str) -> dict[str, int]:
    """'fsdp=8,context=2' as sizes of all axes; one that is not named is 1."""
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
