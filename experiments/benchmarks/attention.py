"""segment_attention next to plain attention by einsum, forward and forward with backward.

    python experiments/benchmarks/attention.py [--rows 16] [--tokens 288] [--heads 4] ...

The defaults are one micro-batch of configs/tiny.py: rows of one segment and a little padding,
float32. `plain` is the textbook's grouped einsum over whole score matrices with JAX's own
gradient. Both are jitted, run once before the clock starts, and alternate; medians of the rounds
in milliseconds. A ratio above 1 means that segment_attention is faster. One JSON line.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.model.attention import HIDDEN, segment_attention


def plain_attention(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """Causal attention within segments, [B, T, N, H], by two einsums and a whole score matrix."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    scores = jnp.einsum('btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    seen_BTS = jnp.tril(segments_BT[:, :, None] == segments_BT[:, None, :])
    scores = jnp.where(seen_BTS[:, None, None], scores * H**-0.5, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum('bkgts,bskh->btkgh', weights, v_BSKH).reshape(B, T, N, H)


def draw(rows, tokens, heads, kv_heads, head_dim):
    rng = np.random.default_rng(0)
    sizes = [(rows, tokens, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    arrays = [jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes]
    lengths = rng.integers(3 * tokens // 4, tokens, (rows, 1))
    return *arrays, jnp.asarray(np.arange(tokens) < lengths, jnp.int32)


def milliseconds(call, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(*args))
    return (time.perf_counter() - start) * 1e3


def compare(passes: dict, args, rounds: int) -> dict[str, float]:
    """Median milliseconds of each of the passes, which alternate, and plain's over ours."""
    times = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, call in passes.items():
            taken = milliseconds(call, *args)
            if number:  # the first round compiles
                times[name].append(taken)
    result = {f'{name}_ms': round(statistics.median(t), 3) for name, t in times.items()}
    return result | {'ratio': round(result['plain_ms'] / result['segment_ms'], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=16)
    parser.add_argument('--tokens', type=int, default=288)
    parser.add_argument('--heads', type=int, default=4)
    parser.add_argument('--kv_heads', type=int, default=1)
    parser.add_argument('--head_dim', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=15)
    options = vars(parser.parse_args())
    rounds = options.pop('rounds')
    args = draw(**options)
    ways = {'segment': segment_attention, 'plain': plain_attention}
    both = {
        name: jax.grad(lambda q, k, v, s, way=way: jnp.square(way(q, k, v, s)).sum(), (0, 1, 2))
        for name, way in ways.items()
    }
    result = {
        'benchmark': 'attention',
        **options,
        'device': jax.devices()[0].device_kind,
        'forward': compare({n: jax.jit(f) for n, f in ways.items()}, args, rounds),
        'forward_backward': compare({n: jax.jit(f) for n, f in both.items()}, args, rounds),
        'load': round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
