"""Tokens a second of the learner's step, next to the same step in transformers or in tunix.

    python experiments/benchmarks/learner_step.py --against=transformers [--size=small] [--compile]
    python experiments/benchmarks/learner_step.py --against=tunix --tunix_python=VENV/bin/python
    python experiments/benchmarks/learner_step.py --rows=1,2,4,8,16,32  # ours alone
    python experiments/benchmarks/learner_step.py --profile [--against=transformers]

Both sides train one random Qwen3 on one batch: forward, ECHO's loss, backward over the same
micro-batches, clip, AdamW. Ours is `ShardedModel.step`, jitted, state donated. The peer
(peer_step.py) loads the model from a Hugging Face directory, in a process of its own, where tunix
may have other versions of JAX. Rows are full. The sides take steps in turn; the first of each,
which compiles, is not counted, but in it and in the second the losses and gradient norms must agree
to --tolerance. Tokens/s are by the medians of the rounds; a `ratio` above 1 means that ours is
faster.

--rows: batches of so many rows. A step costs its tokens and one update, whatever the rows;
`update_ms` is a step of a batch without tokens.

--profile: shares of the step, each by taking a part out: the attention kernel, the head with the
loss, the update; the rest are the layers. Of these, `products` is the time that their matrix
products take alone, as plain two-dimensional ones; with --against=transformers also PyTorch's.

One JSON line. On a GPU: --size=0.6b --dtype=bfloat16 --tolerance=0.02.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from unittest import mock

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from learner import draw_rollouts

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import tiny
from echo_jax.learner import sharding
from echo_jax.learner import step as learner_step
from echo_jax.learner.batching import make_batch
from echo_jax.learner.losses import finish_metrics
from echo_jax.model import attention, huggingface
from echo_jax.model.params import flatten
from echo_jax.types import Batch, TokenScores

_MODEL = (
    *('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers'),
    *('num_attention_heads', 'num_key_value_heads', 'head_dim'),
)
_BATCH = 'rows', 'micro_rows', 'seq_len'
SIZES = {
    'small': ((512, 128, 384, 4, 4, 1, 32), (32, 16, 256)),
    'medium': ((8192, 256, 768, 8, 4, 2, 64), (16, 8, 512)),
    'large': ((32768, 512, 1536, 8, 8, 4, 64), (8, 4, 512)),
    '0.6b': ((151936, 1024, 3072, 28, 16, 8, 128), (8, 2, 4096)),
}
Step = Callable[[], dict[str, float]]  # takes one and returns its seconds, loss and grad_norm


def make_config(args, rows: int | None = None) -> ml_collections.ConfigDict:
    """The tiny recipe at one of SIZES, with `rows` in place of the size's own."""
    model, batch = SIZES[args.size]
    batch = dict(zip(_BATCH, batch))
    rows = rows or batch['rows']
    config = tiny.get_config()
    config.model.update(dict(zip(_MODEL, model)))
    config.model.update(dtype=args.dtype, attention=args.attention, remat=args.remat)
    config.model.rope_theta = 1e6  # whatever its config says, tunix has no other
    config.group_size = min(rows, 8)
    config.batch.groups = rows // config.group_size
    config.batch.micro_rows = min(rows, batch['micro_rows'])
    config.batch.seq_len = config.protocol.max_total_tokens = args.seq_len or batch['seq_len']
    config.optimizer.warmup_steps = 0
    return config


def draw_batch(config: ml_collections.ConfigDict) -> Batch:
    return make_batch(draw_rollouts(config, config.batch.seq_len), config)


# ------------------------------------------------------------------------------------ the two sides


def our_step(sharded: learner_step.ShardedModel, params, batch: Batch) -> Step:
    """Compiles at its first call. The state takes the place of `params`."""
    config = sharded.config
    step, _, first = sharded.step(config.optimizer)
    state = first(params)
    batch = sharding.put_batch(batch, sharded.mesh)

    def run():
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch, config.loss.env_coef, None)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
        values = finish_metrics(metrics)
        return {'seconds': seconds, 'loss': values['loss'], 'grad_norm': values['grad_norm']}

    return run


@contextlib.contextmanager
def peer(args, config, batch: Batch, sharded, params) -> Generator[Callable[[str], dict]]:
    """`ask('step' | 'products')` of the peer's process, which has the same model and batch."""
    python = args.tunix_python if args.against == 'tunix' else sys.executable
    script = pathlib.Path(__file__).with_name('peer_step.py')
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        huggingface.write_model(
            folder / 'model', flatten(params).items(), sharded.model, dtype='float32'
        )
        np.savez(folder / 'batch.npz', **batch._asdict())
        settings = {'micro_rows': config.batch.micro_rows, 'compile': args.compile}
        settings |= {'dtype': config.model.dtype, 'remat': config.model.remat}
        settings |= config.loss.to_dict() | config.optimizer.to_dict()
        (folder / 'settings.json').write_text(json.dumps(settings))
        process = subprocess.Popen(
            [python, script, args.against, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def ask(what: str) -> dict:
            print(what, file=process.stdin, flush=True)
            if not (answer := process.stdout.readline()):
                raise ValueError(f'{args.against} in {python} ended; its error stands above')
            return json.loads(answer)

        with process:
            try:
                yield ask
            finally:
                process.terminate()


def alternate(steps: dict[str, Step], rounds: int, check: Callable = lambda *_: None) -> dict:
    """{name: median seconds}, after a round that does not count; `check(round, answers)`."""
    seconds = {name: [] for name in steps}
    for number in range(rounds + 1):
        answers = {name: step() for name, step in steps.items()}
        check(number, answers)
        for name, answer in answers.items():
            seconds[name].append(answer['seconds'])
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


# ------------------------------------------------------------------------------------ measurements


def compare(args) -> dict:
    config = make_config(args)
    batch, sharded = draw_batch(config), learner_step.ShardedModel.of(config)
    params = sharded.random_params()
    furthest = 0.0

    def agree(number, answers):
        nonlocal furthest
        for key in ('loss', 'grad_norm') if number < 2 else ():
            ours, theirs = answers['ours'][key], answers['theirs'][key]
            apart = abs(ours - theirs) / abs(theirs)
            furthest = max(furthest, apart)
            if not apart <= args.tolerance:
                raise ValueError(
                    f'{key} of step {number} is {ours}, in {args.against} {theirs}; expected the '
                    f'same to {args.tolerance}: they do not compute the same thing'
                )

    with peer(args, config, batch, sharded, params) as ask:
        steps = {'ours': our_step(sharded, params, batch), 'theirs': lambda: ask('step')}
        medians = alternate(steps, args.rounds, agree)
    return {
        'against': args.against,
        'compile': args.compile,
        'tokens_per_s': round(batch.tokens.size / medians['ours']),
        'peer_tokens_per_s': round(batch.tokens.size / medians['theirs']),
        'ratio': round(medians['theirs'] / medians['ours'], 3),
        'apart': float(f'{furthest:.1e}'),
    }


def by_rows(args) -> dict:
    counts = [int(rows) for rows in args.rows.split(',')]
    steps, tokens = {}, {}
    for rows in counts:
        config = make_config(args, rows)
        sharded = learner_step.ShardedModel.of(config)
        batch = draw_batch(config)
        steps[rows] = our_step(sharded, sharded.random_params(), batch)
        tokens[rows] = batch.tokens.size
    steps['update'] = our_step(sharded, sharded.random_params(), without_tokens(batch))
    medians = alternate(steps, args.rounds)
    update = medians.pop('update')
    speeds = {rows: tokens[rows] / medians[rows] for rows in counts}
    return {
        'rows': {rows: round(speed) for rows, speed in speeds.items()},
        'slowest_by_fastest': round(min(speeds.values()) / max(speeds.values()), 3),
        'update_ms': round(1e3 * update, 2),
    }


def without_tokens(batch: Batch) -> Batch:
    return jax.tree.map(np.zeros_like, batch)


def _no_attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, kind):
    G = q_BTNH.shape[2] // k_BTKH.shape[2]
    return q_BTNH + jnp.repeat(k_BTKH + v_BTKH, G, axis=2)  # so that their projections stay


def _no_head(hidden_BTD, unembedding_VD, targets_BT, temperature):
    return TokenScores(*[hidden_BTD.mean(-1, dtype=jnp.float32)] * 3)


def profile(args) -> dict:
    config = make_config(args)
    batch, sharded = draw_batch(config), learner_step.ShardedModel.of(config)

    def without(owner, name, replacement):
        run = our_step(sharded, sharded.random_params(), batch)
        with mock.patch.object(owner, name, replacement):
            run()  # compiles
        return run

    steps = {
        'step': our_step(sharded, sharded.random_params(), batch),
        'attention': without(attention, 'segment_attention', _no_attention),
        'head': without(learner_step, 'score_tokens', _no_head),
        'update': our_step(sharded, sharded.random_params(), without_tokens(batch)),
        'products': our_products(config),
    }
    with contextlib.ExitStack() as stack:
        if args.against == 'transformers':
            ask = stack.enter_context(peer(args, config, batch, sharded, sharded.random_params()))
            steps['peer_products'] = lambda: ask('products')
        medians = alternate(steps, args.rounds)
    whole, update = medians['step'], medians['update']
    parts = {name: whole - medians[name] for name in ('attention', 'head')} | {'update': update}
    parts['layers'] = whole - sum(parts.values())
    repeated = config.model.num_hidden_layers * len(batch.tokens) // config.batch.micro_rows
    forward = 4 / 3 if config.model.remat == 'full' else 1.0
    for name in ('products', 'peer_products'):
        if name in medians:
            parts[name] = medians[name] * repeated * forward
    flops = sum(6 * tokens * a * b for tokens, a, b in product_shapes(config))
    return {
        'step_ms': round(1e3 * whole, 2),
        'shares': {name: round(seconds / whole, 3) for name, seconds in parts.items()},
        'gflop_per_s': {
            name: round(flops / medians[name] / 1e9) for name in medians if 'products' in name
        },
    }


def product_shapes(config) -> list[tuple[int, int, int]]:
    """(tokens, in, out) of the matrix products of one layer over one micro-batch."""
    c, tokens = config.model, config.batch.micro_rows * config.batch.seq_len
    D, F = c.hidden_size, c.intermediate_size
    queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
    pairs = [(D, queries), (D, keys), (D, keys), (queries, D), (D, F), (D, F), (F, D)]
    return [(tokens, a, b) for a, b in pairs]


def our_products(config) -> Step:
    """One layer's products, forward and backward, over one micro-batch."""
    key, dtype = jax.random.key(0), config.model.dtype
    arrays = [
        [jax.random.normal(key, shape, dtype) for shape in ((m, a), (a, b), (m, b))]
        for m, a, b in product_shapes(config)
    ]
    multiply = jax.jit(lambda arrays: [(x @ w, d @ w.T, x.T @ d) for x, w, d in arrays])

    def run():
        start = time.perf_counter()
        jax.block_until_ready(multiply(arrays))
        return {'seconds': time.perf_counter() - start}

    return run


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends all, as Ctrl-C does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--against', choices=('transformers', 'tunix'))
    parser.add_argument('--tunix_python', default=sys.executable, help='that has google-tunix')
    parser.add_argument('--size', choices=SIZES, default='small')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--rows', help='numbers of rows, with commas between')
    parser.add_argument('--seq_len', type=int, help="of a row, in place of the size's own")
    parser.add_argument('--profile', action='store_true')
    parser.add_argument('--compile', action='store_true', help="transformers' model, torch.compile")
    parser.add_argument('--dtype', default='float32', help='of activations')
    parser.add_argument('--attention', default='auto', choices=attention.KINDS, help='ours')
    parser.add_argument('--remat', default='none', choices=('none', 'full'), help='of both sides')
    parser.add_argument('--tolerance', type=float, default=1e-4, help='relative')
    args = parser.parse_args()
    if not (args.rows or args.profile or args.against):
        parser.error('nothing to measure; expected --against, --rows or --profile')
    measure = by_rows if args.rows else profile if args.profile else compare
    batch = dict(zip(_BATCH, SIZES[args.size][1]))
    batch['seq_len'] = args.seq_len or batch['seq_len']
    result = {'benchmark': 'learner_step', 'size': args.size, **batch, 'remat': args.remat}
    result |= {'dtype': args.dtype, 'device': jax.devices()[0].device_kind} | measure(args)
    print(json.dumps(result | {'load': round(os.getloadavg()[0], 1)}))


if __name__ == '__main__':
    main()
