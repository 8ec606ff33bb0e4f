"""Tokens a second of a worker's vLLM while every turn of an episode waits for its sandbox.

    .venv-rollout/bin/python experiments/benchmarks/rollout_engine.py [--latency=1.0] [--model=DIR]

Episodes of `--turns` turns: `--turn-tokens` are sampled, a sleep stands for the command, and
`--observation-tokens` follow. `--episodes` are in flight, of which `--slots` decode together. The
same turns are drawn with no sleep; both alternate within each round. Weights are random, at the
sizes of DIR/config.json or of configs/tiny.py. tokens_per_s is over the middle 80% of a round's
turns, so without its ramp and its tail; whole_round has both. One JSON line, medians of the rounds.
"""

import argparse
import asyncio
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.policy.vllm import VllmPolicy
from echo_jax.store.weights import WeightStore

TINY = dict(
    architectures=['Qwen3ForCausalLM'],
    model_type='qwen3',
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
)


def random_weights(config: dict) -> tuple[dict[str, np.ndarray], dict[str, dict]]:
    """A Qwen3's arrays, stacked over the layers, and what vllm_rank.py must know of each.

    One engine has one rank here, so nothing is split.
    """
    layers, width = config['num_hidden_layers'], config['hidden_size']
    heads = config['num_attention_heads'] * config['head_dim']
    kv_heads = config['num_key_value_heads'] * config['head_dim']
    inner, vocab = config['intermediate_size'], config['vocab_size']
    shapes = {
        'model.embed_tokens': (vocab, width),
        'model.norm': (width,),
        'input_layernorm': (width,),
        'post_attention_layernorm': (width,),
        'self_attn.q_norm': (config['head_dim'],),
        'self_attn.k_norm': (config['head_dim'],),
        'self_attn.q_proj': (width, heads),
        'self_attn.k_proj': (width, kv_heads),
        'self_attn.v_proj': (width, kv_heads),
        'self_attn.o_proj': (heads, width),
        'mlp.gate_proj': (width, inner),
        'mlp.up_proj': (width, inner),
        'mlp.down_proj': (inner, width),
    }
    if not config['tie_word_embeddings']:
        shapes['lm_head'] = (vocab, width)
    rng, arrays, about = np.random.default_rng(0), {}, {}
    for name, shape in shapes.items():
        whole = name.startswith(('model.', 'lm_head'))
        ours = name if whole else f'layers/{name}'
        shape = shape if whole else (layers, *shape)
        about[ours] = {
            'name': f'{name}.weight' if whole else f'model.layers.{{}}.{name}.weight',
            'stacked': not whole,
            'transposed': len(shape) == 3,
            'split': None,
        }
        values = rng.standard_normal(shape, np.float32) * np.float32(0.05)
        arrays[ours] = values + 1 if 'norm' in name else values
    return arrays, about


async def episode(policy: VllmPolicy, args, vocab_size: int, latency: float, number: int) -> list:
    """(when, tokens) of each of its turns."""
    rng, finished = np.random.default_rng(number), []
    context = rng.integers(0, vocab_size, args.prompt_tokens)
    for turn in range(args.turns):
        generation = await policy.generate(
            context,
            max_tokens=args.turn_tokens,
            temperature=1.0,
            seed=number * args.turns + turn,
            stop_token_ids=(),
        )
        finished.append((time.perf_counter(), len(generation.token_ids)))
        await asyncio.sleep(latency)
        observation = rng.integers(0, vocab_size, args.observation_tokens)
        context = np.concatenate([context, generation.token_ids, observation])
    return finished


async def draw(policy, args, vocab_size: int, latency: float, number: int) -> dict[str, float]:
    """Tokens a second of one round."""
    start = time.perf_counter()
    firsts = range(number * args.episodes, (number + 1) * args.episodes)
    episodes = (episode(policy, args, vocab_size, latency, first) for first in firsts)
    times, tokens = zip(*sorted(itertools.chain(*await asyncio.gather(*episodes))))
    low, high = len(times) // 10, len(times) - len(times) // 10 - 1
    return {
        'tokens_per_s': sum(tokens[low + 1 : high + 1]) / (times[high] - times[low]),
        'whole_round': sum(tokens) / (times[-1] - start),
    }


async def measure(args) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config, model_dir = TINY, pathlib.Path(args.model or f'{folder}/model')
        if args.model:
            config = json.loads((model_dir / 'config.json').read_text())
        else:
            model_dir.mkdir()
            (model_dir / 'config.json').write_text(json.dumps(config))
        arrays, about = random_weights(config)
        # Nobody scored these weights: whatever the engine says of the probe is taken.
        probe = {'tokens': [1, 2, 3], 'logprobs': [0.0, 0.0, 0.0], 'temperature': 1.0}
        store = WeightStore(f'{folder}/weights')
        store.publish(arrays, 0, about={'arrays': about, 'probe': probe})
        context = args.prompt_tokens + args.turns * (args.turn_tokens + args.observation_tokens)
        policy = await VllmPolicy.start(
            model_dir,
            store.url,
            dtype=args.dtype,
            max_model_len=context,
            max_num_seqs=args.slots,
            probe_tolerance=np.inf,
            enforce_eager=args.eager,
        )
        await policy.load(0)
        rounds = {0.0: [], args.latency: []}
        for number in range(args.rounds + 1):
            for latency in rounds:
                rounds[latency].append(
                    await draw(
                        policy, args, config['vocab_size'], latency, number * 2 + bool(latency)
                    )
                )
        await policy.close()
    return {
        name: {
            key: round(statistics.median(row[key] for row in rows[1:])) for key in rows[0]
        }  # the first round warms up
        for name, rows in (('no_sandbox', rounds[0.0]), ('sandbox', rounds[args.latency]))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', help='Hugging Face directory; its config.json is read')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--eager', action='store_true', help='do not let vLLM compile the model')
    parser.add_argument('--latency', type=float, default=1.0, help='seconds a command')
    parser.add_argument('--episodes', type=int, default=256, help='in flight')
    parser.add_argument('--slots', type=int, default=64, help='turns that decode together')
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--prompt-tokens', type=int, default=64)
    parser.add_argument('--turn-tokens', type=int, default=64)
    parser.add_argument('--observation-tokens', type=int, default=32)
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    result = asyncio.run(measure(args))
    shares = {
        key: round(result['sandbox'][key] / result['no_sandbox'][key], 3)
        for key in result['sandbox']
    }
    settings = {key: value for key, value in vars(args).items() if key != 'model'}
    load = round(os.getloadavg()[0], 1)
    print(
        json.dumps(
            {'benchmark': 'rollout_engine', **settings, **result, 'share': shares, 'load': load}
        )
    )


if __name__ == '__main__':
    main()
