"""How much of a worker's engine stands idle through swaps of its weights, by `policy.swap`.

    .venv-rollout/bin/python experiments/benchmarks/swaps.py [--slots=32] [--turn-tokens=500]

Every slot samples turns of `--turn-tokens` tokens, one after the other; the first of each ends
somewhere within, so that turns end at different times. A swap begins whenever
`--slots` x `--turn-tokens` tokens have been sampled since the one before, `--swaps` times. The
modes have an engine each, one after the other, on the same weights: a random model of the sizes of
configs/tiny.py, whose next version is `--change` (a standard deviation) away from the one before.

idle is the share of the slots' time in which nothing was sampled for them, from the beginning of
the first swap to where the next after the last would begin. A step that gives n tokens leaves
1 - n / slots of the time since the step before idle, and all of that time before new weights were
loaded. Prefilling again is idle by this, if it takes a step of its own. resting is the same without
that: the share in which the engine had no turn for a slot, or was loading weights.
gap is the distance in nats between the log-probabilities that a turn's tokens had when they were
sampled and those that the engine gives for the same turn as a prompt, over tokens after the last
swap in turns that it interrupted; moved is the same distance for their tokens before the swap, so
how far the new weights are from the old ones. rounding is the same distance in turns that the last
version sampled as a whole: what gap would be if a swap cost nothing. One JSON line.
"""

import argparse
import asyncio
import json
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.learner.batching import make_token_batch
from echo_jax.policy import SWAPS
from echo_jax.policy.vllm import VllmPolicy
from echo_jax.store.weights import WeightStore
from experiments.benchmarks.rollout_engine import TINY, random_weights


class Watched(VllmPolicy):
    """Notes when the engine gives tokens, and when new weights are in it."""

    def watch(self) -> None:
        self.steps: list[tuple[float, int, int]] = []  # (when, tokens, turns in the engine)
        self.loaded: list[float] = []
        self.sampled = 0
        processor = self.engine.output_processor
        process = processor.process_outputs

        def noted(outputs, *args, **kwargs):
            tokens = sum(len(output.new_token_ids) for output in outputs)
            if tokens:
                self.steps.append((time.monotonic(), tokens, len(processor.request_states)))
                self.sampled += tokens
            return process(outputs, *args, **kwargs)

        processor.process_outputs = noted

    async def _try(self, *args):
        tried = await super()._try(*args)
        self.loaded.append(tried.loaded)
        return tried


def shares(policy: Watched, slots: int, begin: float, end: float) -> dict[str, float]:
    """Of the slots' time from `begin` to `end`, both by time.monotonic."""
    seconds, before = np.zeros(2), begin
    for when, *counts in policy.steps:
        if not begin < when <= end:
            continue
        loaded = max([at for at in policy.loaded if before < at <= when], default=before)
        busy = np.minimum(counts, slots) / slots
        seconds += loaded - before + (when - loaded) * (1 - busy)
        before = when
    idle, resting = (seconds + end - before) / (end - begin)
    return {'idle': round(float(idle), 4), 'resting': round(float(resting), 4)}


async def sample(policy: Watched, args, slot: int, turns: list, stop: asyncio.Event) -> None:
    """Turns of one slot until `stop`: (context, generation) of each."""
    rng, length = np.random.default_rng(slot), args.turn_tokens * (slot + 1) // args.slots
    while not stop.is_set():
        context = rng.integers(0, TINY['vocab_size'], args.prompt_tokens)
        generation = await policy.generate(
            context,
            max_tokens=length,
            temperature=1.0,
            seed=int(rng.integers(1 << 31)),
            stop_token_ids=(),
        )
        turns.append((context, generation))
        length = args.turn_tokens


async def gaps(policy: Watched, turns: list) -> dict[str, float]:
    """See the module's docstring; and how many tokens each mean is over."""
    found = {'gap': [], 'moved': [], 'rounding': []}
    for context, generation in turns:
        new = generation.versions == policy.version
        if not new.any():
            continue
        tokens = np.concatenate([context, generation.token_ids])
        batch = make_token_batch(tokens[np.newaxis], 1, len(tokens))
        scored = (await policy.score(batch))[0, len(context) :]
        distances = np.abs(scored - generation.logprobs)
        found['rounding' if new.all() else 'gap'] += distances[new].tolist()
        found['moved'] += distances[~new].tolist()
    result = {}
    for name, values in found.items():
        result[name] = {'tokens': len(values)}
        if values:
            result[name] |= {'mean': float(np.mean(values)), 'max': float(np.max(values))}
    return result


async def measure(args, mode: str, model_dir: pathlib.Path, url: str) -> dict:
    policy = await Watched.start(
        model_dir,
        url,
        dtype='float32',
        max_model_len=args.prompt_tokens + args.turn_tokens + 1,
        max_num_seqs=args.slots,
        swap=mode,
        probe_tolerance=np.inf,
        enforce_eager=True,
    )
    policy.watch()
    await policy.load(0)
    turns, stop, swaps = [], asyncio.Event(), []
    begins: list[float] = []
    async with asyncio.TaskGroup() as running:
        for slot in range(args.slots):
            running.create_task(sample(policy, args, slot, turns, stop))
        for version in range(1, args.swaps + 2):
            while policy.sampled < version * args.slots * args.turn_tokens:
                await asyncio.sleep(0.001)
            begins.append(time.monotonic())
            if version <= args.swaps:
                await policy.load(version)
                swaps.append(policy.swap)
        stop.set()
    found = await gaps(policy, turns) if mode != 'drain' else {}
    await policy.close()
    seconds = {
        name: round(float(np.mean([getattr(swap, name) for swap in swaps])), 3)
        for name in ('read_seconds', 'drain_seconds', 'load_seconds', 'probe_seconds')
    }
    return {
        **shares(policy, args.slots, begins[0], begins[-1]),
        'tokens_per_s': round(
            args.swaps * args.slots * args.turn_tokens / (begins[-1] - begins[0])
        ),
        **seconds,
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--modes', default=','.join(SWAPS))
    parser.add_argument('--slots', type=int, default=32, help='turns that decode together')
    parser.add_argument('--prompt-tokens', type=int, default=64)
    parser.add_argument('--turn-tokens', type=int, default=500)
    parser.add_argument('--swaps', type=int, default=3)
    parser.add_argument('--change', type=float, default=1e-3, help='of every weight, a version')
    args = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        model_dir = pathlib.Path(folder, 'model')
        model_dir.mkdir()
        (model_dir / 'config.json').write_text(json.dumps(TINY))
        arrays, about = random_weights(TINY)
        rng, store = np.random.default_rng(1), WeightStore(f'{folder}/weights', keep=args.swaps + 2)
        # Nobody scored these weights: whatever the engine says of the probe is taken.
        probe = {'tokens': [1, 2, 3], 'logprobs': [0.0, 0.0, 0.0], 'temperature': 1.0}
        for version in range(args.swaps + 1):
            store.publish(arrays, version, about={'arrays': about, 'probe': probe})
            arrays = {
                name: array + rng.standard_normal(array.shape, np.float32) * np.float32(args.change)
                for name, array in arrays.items()
            }
        for mode in args.modes.split(','):
            result[mode] = asyncio.run(measure(args, mode, model_dir, store.url))
    load = round(os.getloadavg()[0], 1)
    print(json.dumps({'benchmark': 'swaps', **vars(args), **result, 'load': load}))


if __name__ == '__main__':
    main()
