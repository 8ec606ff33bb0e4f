"""A learner's weights and a real vLLM that samples with them, driven by a test."""

import asyncio

import numpy as np

from echo_jax.policy import Generation
from echo_jax.policy.vllm import VllmPolicy
from tests.support.qwen3_learner import VOCAB, Learner

MAX_MODEL_LEN = 512
RNG = np.random.default_rng(1)
# Longer than a block of the prefix cache, which has 128 tokens on a CPU.
PROMPTS = [RNG.integers(0, VOCAB, length) for length in (1, 140, 200, 300)]


class Rig:
    """One learner, one engine, one event loop; versions count on from test to test."""

    def __init__(
        self, folder, *, tied: bool, kv_heads: int = 2, swap: str = 'recompute', **options
    ):
        self.learner, self.mode = Learner(folder, tied=tied, kv_heads=kv_heads), swap
        self.loop = asyncio.Runner()
        self.next = 0
        # Minutes, on a busy machine.
        self.policy = self.loop.run(start(self.learner, swap=swap, **options))

    def run(self, work):
        return self.loop.run(asyncio.wait_for(work, 240))

    def publish(self, **options) -> int:
        self.learner.change(0.02)
        self.learner.publish(self.next, **options)
        self.next += 1
        return self.next - 1

    def swap(self) -> int:
        version = self.publish()
        self.run(self.policy.load(version))
        return version

    def fail_at(self, *faults: str) -> None:
        self.run(self.policy.engine.collective_rpc('fail_at', args=faults))

    def generate(self, prompts, **options) -> list[Generation]:
        return self.run(generate_all(self.policy, prompts, **options))

    def gap(self, prompt, generation, temperature: float = 1.0) -> float:
        """The largest distance from the reference's log-probabilities, by the version sampled."""
        return max(self.gaps(prompt, generation, temperature).values())

    def gaps(self, prompt, generation, temperature: float = 1.0) -> dict[int, float]:
        """The same for the tokens of each version: those before have that version's weights too."""
        tokens, found = [*prompt, *generation.token_ids], {}
        for version in {*generation.versions.tolist()}:
            expected = self.learner.logprobs(tokens, temperature, version)[len(prompt) :]
            assert np.abs(expected).max() > 0.1  # something to be wrong about
            distances = np.abs(generation.logprobs - expected)
            found[version] = float(distances[generation.versions == version].max())
        return found


async def start(learner: Learner, **options) -> VllmPolicy:
    return await VllmPolicy.start(
        learner.model_dir,
        learner.url,
        dtype='float32',
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        enforce_eager=True,
        worker_extension_cls='tests.support.faulty_rank.FaultyLoader',
        **options,
    )


async def generate_all(policy, prompts, *, temperature=1.0, max_tokens=16, seed=0, stop=()):
    turns = (
        policy.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed + i,
            stop_token_ids=stop,
        )
        for i, prompt in enumerate(prompts)
    )
    return await asyncio.gather(*turns)


async def running(policy, turns: int, sampling: asyncio.Task) -> None:
    """Returns when so many turns run; raises what ended `sampling`, which they belong to."""
    while policy.engine.output_processor.get_num_unfinished_requests() < turns:
        if sampling.done():
            raise AssertionError(f'the turns have ended: {sampling.result()}')
        await asyncio.sleep(0.001)


async def interrupted(policy, turns, version, **options) -> list:
    """The results or errors of turns that ran when `version` was loaded, and of its `load`."""
    first = asyncio.create_task(generate_all(policy, turns, **options))
    await running(policy, len(turns), first)
    (load,) = await asyncio.gather(policy.load(version), return_exceptions=True)
    assert load is not None or not first.done()
    return [*await asyncio.gather(first, return_exceptions=True), load]
