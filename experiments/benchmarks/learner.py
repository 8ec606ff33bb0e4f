"""Tokens a second of the jitted training step, and what `eval.balance` costs beside it.

    python experiments/benchmarks/learner.py [--config configs/tiny.py] [--rounds 5] [--short]

The step is that of `learner.step.make_step` with the recipe's optimizer and ECHO's term: forward,
both losses, backward over micro-batches, clip and update, with the state donated. The batch is
random tokens, one rollout a row, and every row is full; with --short rows are half full, and their
padding is not counted as tokens. The same step with benchmarks/attention.py's plain einsum in place
of segment_attention takes turns with it, and so does `learner.step.make_balance`, which
`eval.balance` adds to some steps. The result holds medians of the rounds without the first. A ratio
above 1 means that segment_attention's step is faster; `balance_steps` is the measurement's time in
steps, `balance_cpu_steps` the same of CPU seconds, which a busy machine changes less, and
`balance_share` the latter over `eval.every`, what it adds to a run's learning. The two `_mib` are
the memory that XLA plans for, beside what is passed in. Prints one JSON line.
"""

import argparse
import importlib
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from attention import plain_attention
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.learner.batching import make_batch
from echo_jax.learner.optimizer import make_optimizer
from echo_jax.learner.step import init_state, make_balance, make_step
from echo_jax.model import attention
from echo_jax.model.qwen3 import Qwen3, Qwen3Config
from echo_jax.types import Batch, Role, Rollout, Status


def draw_rollouts(config, length: int) -> list[Rollout]:
    """Full groups: a quarter of each rollout is prompt, then 24 actions and 24 outputs in turn."""
    rng = np.random.default_rng(0)
    roles = np.where(np.arange(length) // 24 % 2, Role.OUTPUT, Role.ACTION).astype(np.uint8)
    roles[: length // 4] = Role.PROMPT
    return [
        Rollout(
            tokens=rng.integers(0, config.model.vocab_size, length, np.int32),
            roles=roles,
            rollout_logprobs=np.where(roles == Role.ACTION, -1.0, 0.0).astype(np.float32),
            policy_versions=np.where(roles == Role.ACTION, 0, -1).astype(np.int32),
            turn_starts=np.flatnonzero(np.diff(roles == Role.ACTION) & (roles[1:] == Role.ACTION))
            + 1,
            reward=float(rng.integers(2)),
            status=Status.OK,
            task_id='benchmark',
            group_id=group,
            sample_id=sample,
        )
        for group in range(config.batch.groups)
        for sample in range(config.group_size)
    ]


def build(config) -> tuple[nnx.GraphDef, nnx.State]:
    sizes = {k: v for k, v in config.model.items() if k not in ('path', 'model_type')}
    return nnx.split(Qwen3(Qwen3Config(**sizes), rngs=nnx.Rngs(0)))


def make_run(config, batch: Batch, attend: Callable) -> tuple[Callable[[], float], float]:
    """A function that takes one step and returns its seconds, and the step's memory in MiB.

    `attend` is compiled into it.
    """
    graphdef, params = build(config)
    optimizer = make_optimizer(config.optimizer)
    state = init_state(params, optimizer)
    step = jax.jit(make_step(graphdef, optimizer, config), donate_argnums=0, static_argnums=2)
    ours, attention.segment_attention = attention.segment_attention, attend
    compiled = step.lower(state, batch, config.loss.env_coef).compile()
    attention.segment_attention = ours

    def run():
        nonlocal state
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return run, mib(compiled)


def make_measurement(config, batch: Batch) -> tuple[Callable[[], float], float]:
    """The same for `make_balance`."""
    graphdef, params = build(config)
    compiled = jax.jit(make_balance(graphdef, config)).lower(params, batch).compile()

    def run():
        start = time.perf_counter()
        jax.block_until_ready(compiled(params, batch))
        return time.perf_counter() - start

    return run, mib(compiled)


def mib(compiled: jax.stages.Compiled) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def plain_instead(q, k, v, segments, _kind):
    """`plain_attention` with segment_attention's parameters."""
    return plain_attention(q, k, v, segments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/tiny.py')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--short', action='store_true', help='rows are half full')
    args = parser.parse_args()
    config = importlib.import_module(args.config.removesuffix('.py').replace('/', '.')).get_config()
    length = config.batch.seq_len // (2 if args.short else 1)
    batch = jax.device_put(make_batch(draw_rollouts(config, length), config))
    tokens = int((batch.segment_ids > 0).sum())
    ways = {'segment': attention.segment_attention, 'plain': plain_instead}
    made = {name: make_run(config, batch, attend) for name, attend in ways.items()}
    made['balance'] = make_measurement(config, batch)
    runs = {name: run for name, (run, _) in made.items()}
    seconds, cpu_seconds = ({name: [] for name in runs} for _ in range(2))
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            taken = run()
            if number:
                seconds[name].append(taken)
                cpu_seconds[name].append(time.process_time() - began)
    cpu = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        'benchmark': 'learner',
        'config': args.config,
        'rows': len(batch.tokens),
        'tokens_a_step': tokens,
        'device': jax.devices()[0].device_kind,
        'tokens_per_s': round(tokens / medians['segment']),
        'plain_tokens_per_s': round(tokens / medians['plain']),
        'ratio': round(medians['plain'] / medians['segment'], 3),
        'balance_steps': round(medians['balance'] / medians['segment'], 2),
        'balance_cpu_steps': round(cpu['balance'] / cpu['segment'], 2),
        'balance_share': round(cpu['balance'] / cpu['segment'] / config.eval.every, 3),
        'step_mib': round(made['segment'][1], 1),
        'balance_mib': round(made['balance'][1], 1),
        'load': round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
