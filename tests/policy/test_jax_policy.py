"""The embedded sampler against full forward passes of the same model."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from echo_jax.model.qwen3 import Qwen3, Qwen3Config
from echo_jax.policy.jax import JaxPolicy

CONFIG = Qwen3Config(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.2,
)
GRAPHDEF, _ = nnx.split(nnx.eval_shape(lambda: Qwen3(CONFIG, rngs=nnx.Rngs(0))))
PARAMS = jax.jit(lambda: nnx.state(Qwen3(CONFIG, rngs=nnx.Rngs(0))))()
STOP = (7,)
ROW = 256  # tokens of a full pass; longer than any episode here


def make_policy(slots=8, cache_tokens=160):
    return JaxPolicy(CONFIG, GRAPHDEF, slots=slots, cache_tokens=cache_tokens)


def prompt(seed, length):
    return np.random.default_rng(seed).integers(8, 96, length).astype(np.int32)


@jax.jit
def full_logits(row):
    model = nnx.merge(GRAPHDEF, PARAMS)
    hidden = model(row[None], jnp.arange(ROW)[None], jnp.ones((1, ROW), jnp.int32))
    return hidden[0] @ model.unembedding.T


def next_token_logits(tokens):
    """[T - 1, V] of tokens 1 to T - 1, by one forward pass over everything, no cache."""
    row = np.zeros(ROW, np.int32)  # what comes after a token changes nothing before it
    row[: len(tokens)] = tokens
    return np.asarray(full_logits(row))[: len(tokens) - 1]


def full_logprobs(tokens, temperature):
    logits = next_token_logits(tokens) / temperature
    logits -= logits.max(-1, keepdims=True)
    picked = logits[np.arange(len(logits)), tokens[1:]]
    return np.r_[0.0, picked - np.log(np.exp(logits).sum(-1))]


async def episode(policy, seed, turns=3, temperature=1.0, delay=0.0):
    """Three turns whose observations are random tokens: (all tokens, sampled mask, logprobs)."""
    tokens = prompt(seed, 5 + seed % 40)
    sampled, logprobs = np.zeros(len(tokens), bool), np.zeros(len(tokens), np.float32)
    for turn in range(turns):
        g = await policy.generate(
            tokens,
            max_tokens=12,
            temperature=temperature,
            seed=seed * 100 + turn,
            stop_token_ids=STOP,
        )
        await asyncio.sleep(delay)
        observation = prompt(seed + 1000 + turn, 3 + (seed + turn) % 37)
        tokens = np.concatenate([tokens, g.token_ids, observation])
        sampled = np.concatenate(
            [sampled, np.ones(len(g.token_ids), bool), np.zeros(len(observation), bool)]
        )
        logprobs = np.concatenate([logprobs, g.logprobs, np.zeros(len(observation), np.float32)])
    return tokens, sampled, logprobs


def play(seeds, slots=8, temperature=1.0, delays=None):
    async def main():
        policy = make_policy(slots)
        await policy.load(PARAMS, 3)
        delays_ = delays or [0.0] * len(seeds)
        return await asyncio.gather(
            *(episode(policy, s, temperature=temperature, delay=d) for s, d in zip(seeds, delays_))
        )

    return asyncio.run(main())


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_logprobs_equal_full_forward_passes(temperature):
    for tokens, sampled, logprobs in play([1, 2, 3, 4, 5], temperature=temperature):
        assert sampled.sum() > 3
        expected = full_logprobs(tokens, temperature)
        np.testing.assert_allclose(logprobs[sampled], expected[sampled], atol=2e-5)


def test_its_meter_counts_the_tokens_of_all_turns():
    policy = make_policy()

    async def main():
        await policy.load(PARAMS, 0)
        return await asyncio.gather(*(episode(policy, seed) for seed in (1, 2, 3)))

    tokens = sum(int(sampled.sum()) for _, sampled, _ in asyncio.run(main()))
    found = policy.meter.read()
    assert found['sampled_tokens'] == tokens > 9
    assert policy.meter.turns == 0 and 0 < found['idle'] < 1 and found['swapping'] == 0


def test_greedy_is_the_argmax_of_full_forward_passes():
    ((tokens, sampled, _),) = play([9], temperature=0.0)
    best = np.r_[-1, next_token_logits(tokens).argmax(-1)]
    np.testing.assert_array_equal(tokens[sampled], best[sampled])


def test_a_sample_depends_on_its_seed_alone_bit_for_bit():
    """Alone or among others, in another slot, at another time: the same tokens and logprobs."""
    together = play([11, 12, 13, 14, 15, 16], delays=[0, 0.05, 0.01, 0.03, 0, 0.02])
    shuffled = play([16, 13, 12, 15, 14, 11], delays=[0.03, 0, 0.02, 0, 0.01, 0])
    for (tokens, _, logprobs), seed in zip(together, [11, 12, 13, 14, 15, 16]):
        other = shuffled[[16, 13, 12, 15, 14, 11].index(seed)]
        alone = play([seed])[0]
        for again in (other, alone):
            np.testing.assert_array_equal(tokens, again[0])
            np.testing.assert_array_equal(logprobs, again[2])


@pytest.mark.slow
def test_more_episodes_than_slots_still_gives_right_logprobs():
    for tokens, sampled, logprobs in play(list(range(20, 32)), slots=3):
        np.testing.assert_allclose(
            logprobs[sampled], full_logprobs(tokens, 1.0)[sampled], atol=2e-5
        )


def test_the_cache_is_kept_from_turn_to_turn():
    """The second turn prefills its observation, not its history."""

    async def main():
        policy = make_policy()
        await policy.load(PARAMS, 0)
        fed = []
        prefill = policy._prefill
        policy._prefill = lambda p, c, i, t, s: fed.append(s.min()) or prefill(p, c, i, t, s)
        tokens = prompt(0, 70)
        g = await policy.generate(tokens, max_tokens=9, temperature=1.0, seed=0, stop_token_ids=())
        first = len(fed)
        tokens = np.concatenate([tokens, g.token_ids, prompt(1, 20)])
        await policy.generate(tokens, max_tokens=9, temperature=1.0, seed=1, stop_token_ids=())
        return first, len(fed), g

    first, total, g = asyncio.run(main())
    assert len(g.token_ids) == 9 and g.finish_reason == 'length'
    assert first == 3  # 69 tokens in pieces of 32
    assert total == 4  # the last sampled token and 19 of the 20 that follow: one piece


def test_stop_token_ends_the_turn_and_is_returned():
    async def main():
        policy = make_policy()
        await policy.load(PARAMS, 5)
        return [
            await policy.generate(
                prompt(s, 9), max_tokens=40, temperature=1.0, seed=s, stop_token_ids=tuple(range(4))
            )
            for s in range(12)
        ]

    results = asyncio.run(main())
    stopped = [g for g in results if g.finish_reason == 'stop']
    assert stopped and all(g.token_ids[-1] < 4 and (g.token_ids[:-1] >= 4).all() for g in stopped)
    assert all((g.versions == 5).all() for g in results)


def test_new_weights_drop_the_cache():
    other = jax.tree.map(lambda x: x * 1.1, PARAMS)

    async def main():
        policy = make_policy()
        await policy.load(PARAMS, 0)
        tokens = prompt(3, 30)
        ask = {'max_tokens': 8, 'temperature': 1.0, 'stop_token_ids': ()}
        g = await policy.generate(tokens, seed=0, **ask)
        await policy.load(other, 1)
        tokens = np.concatenate([tokens, g.token_ids, prompt(4, 5)])
        warm = await policy.generate(tokens, seed=1, **ask)
        fresh = make_policy()
        await fresh.load(other, 1)
        return warm, await fresh.generate(tokens, seed=1, **ask)

    warm, fresh = asyncio.run(main())
    np.testing.assert_array_equal(warm.token_ids, fresh.token_ids)
    np.testing.assert_array_equal(warm.logprobs, fresh.logprobs)
    assert set(warm.versions) == {1}


def test_a_turn_has_the_version_that_sampled_it():
    async def main():
        policy = make_policy()
        await policy.load(PARAMS, 0)
        ask = {'max_tokens': 40, 'temperature': 1.0, 'stop_token_ids': ()}
        turn = asyncio.create_task(policy.generate(prompt(3, 9), seed=0, **ask))
        for _ in range(3):  # until it has its slot
            await asyncio.sleep(0)
        assert policy.meter.turns == 1
        await policy.load(jax.tree.map(lambda x: x * 1.1, PARAMS), 1)  # waits for the turn
        return await turn, await policy.generate(prompt(3, 9), seed=0, **ask)

    before, after = asyncio.run(main())
    assert (set(before.versions), set(after.versions)) == ({0}, {1})


def test_a_cancelled_generation_frees_its_slot():
    async def main():
        policy = make_policy(slots=3)
        await policy.load(PARAMS, 0)
        ask = {'temperature': 1.0, 'stop_token_ids': ()}
        tasks = [
            asyncio.create_task(policy.generate(prompt(0, 9), max_tokens=140, seed=s, **ask))
            for s in range(3)
        ]
        await asyncio.sleep(0.005)
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
        return await policy.generate(prompt(1, 9), max_tokens=4, seed=1, **ask)

    assert len(asyncio.run(main()).token_ids) == 4


def test_too_long_a_context_says_what_to_change():
    async def main():
        policy = make_policy()
        await policy.load(PARAMS, 0)
        await policy.generate(
            prompt(0, 150), max_tokens=40, temperature=1.0, seed=0, stop_token_ids=()
        )

    with pytest.raises(ValueError, match='do not fit the cache of 160 tokens; raise'):
        asyncio.run(main())
