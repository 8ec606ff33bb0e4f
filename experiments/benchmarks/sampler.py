"""Tokens a second that the embedded policy samples for 1, 16 and 64 episodes at once.

    python experiments/benchmarks/sampler.py [--config configs/tiny.py] [--episodes 1 16 64]

The model has random weights at the recipe's sizes. Every episode asks for 64 tokens after a prompt
of its own of 60 tokens, all at the same time and with no stop token. The time includes the prefill.
A first round with other prompts compiles; then the median of the rounds is reported, in tokens a
second over all episodes. `tokens_per_s` has as many slots as episodes, `in_recipe_slots` has
`policy.slots`, as in a training run that has only so many episodes left. Prints one line of JSON.
"""

import argparse
import asyncio
import importlib
import json
import os
import pathlib
import statistics
import sys
import time

import jax
import numpy as np
from flax import nnx

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.model.qwen3 import Qwen3, Qwen3Config
from echo_jax.policy.jax import JaxPolicy

PROMPT_TOKENS, NEW_TOKENS = 60, 64


async def sample(policy: JaxPolicy, episodes: int, vocab_size: int, number: int) -> float:
    """Tokens a second of one round."""
    rng = np.random.default_rng([number, episodes])
    prompts = rng.integers(0, vocab_size, (episodes, PROMPT_TOKENS))
    start = time.perf_counter()
    generations = await asyncio.gather(
        *(
            policy.generate(
                prompt, max_tokens=NEW_TOKENS, temperature=1.0, seed=i, stop_token_ids=()
            )
            for i, prompt in enumerate(prompts)
        )
    )
    seconds = time.perf_counter() - start
    return sum(len(g.token_ids) for g in generations) / seconds


async def measure(model, params, slots: int, episodes: int, config, rounds: int) -> int:
    model_config, graphdef = model
    cache_tokens = config.protocol.max_total_tokens
    policy = JaxPolicy(model_config, graphdef, slots=slots, cache_tokens=cache_tokens)
    await policy.load(params, 0)
    vocab_size = config.model.vocab_size
    speeds = [await sample(policy, episodes, vocab_size, n) for n in range(rounds + 1)]
    return round(statistics.median(speeds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--config', default='configs/tiny.py')
    parser.add_argument('--episodes', type=int, nargs='+', default=[1, 16, 64])
    parser.add_argument('--rounds', type=int, default=3)
    args = parser.parse_args()
    config = importlib.import_module(args.config.removesuffix('.py').replace('/', '.')).get_config()
    model_config = Qwen3Config(**{k: v for k, v in config.model.items() if k != 'path'})
    graphdef, params = nnx.split(Qwen3(model_config, rngs=nnx.Rngs(0)))

    def speeds(slots_of):
        return {
            n: asyncio.run(
                measure((model_config, graphdef), params, slots_of(n), n, config, args.rounds)
            )
            for n in args.episodes
        }

    result = {
        'benchmark': 'sampler',
        'config': args.config,
        'prompt_tokens': PROMPT_TOKENS,
        'new_tokens': NEW_TOKENS,
        'device': jax.devices()[0].device_kind,
        'tokens_per_s': speeds(lambda n: n),
        'in_recipe_slots': speeds(lambda n: config.policy.slots),
        'load': round(os.getloadavg()[0], 1),
    }
    print(json.dumps(result))


if __name__ == '__main__':
    main()
