"""Log-probabilities, swaps and their three hazards on a real vLLM, against transformers."""

import asyncio
import multiprocessing
import time

import numpy as np
import pytest

pytest.importorskip('vllm', reason='vLLM is not installed here; `make rollout` makes .venv-rollout')


from echo_jax.policy import PolicyError
from echo_jax.store.kvstore import CorruptError, MissingError
from tests.support.qwen3_learner import EOS, VOCAB
from tests.support.vllm_rig import PROMPTS, RNG, Rig, generate_all, interrupted, running

pytestmark = pytest.mark.timeout(900)  # an engine starts in half a minute, on an idle machine


@pytest.fixture(scope='module', params=['tied-recompute', 'untied-keep', 'tied-drain'])
def rig(request, tmp_path_factory):
    head, swap = request.param.split('-')
    rig = Rig(tmp_path_factory.mktemp(request.param), tied=head == 'tied', swap=swap)
    with pytest.raises(PolicyError, match='no weights yet'):
        rig.generate(PROMPTS[:1])
    rig.swap()
    yield rig
    rig.run(rig.policy.close())
    rig.loop.close()


@pytest.mark.parametrize('temperature', [1.0, 0.7, 0.0])
def test_every_swap_brings_the_learners_logprobs(rig, temperature):
    for _ in range(2):
        version = rig.swap()
        assert rig.policy.version == rig.policy.swap.version == version
        assert rig.policy.swap.probe_gap < 1e-5
        generations = rig.generate(PROMPTS, temperature=temperature)
        for prompt, generation in zip(PROMPTS, generations):
            assert generation.versions.tolist() == [version] * 16
            assert rig.gap(prompt, generation, temperature or 1.0) < 1e-4
            assert generation.logprobs.dtype == np.float32
            if temperature == 0.0:
                logits = rig.learner.logits([*prompt, *generation.token_ids[:-1]], version)
                greedy = logits.argmax(-1)[len(prompt) - 1 :]
                assert greedy.tolist() == generation.token_ids.tolist()


def test_no_turn_uses_the_cache_of_other_weights(rig, monkeypatch):
    """Old keys and values would be used if `load` did not drop them, or, if it keeps them for the
    turns that run, did not set them apart."""

    async def stay(**_):
        return True

    rig.generate(PROMPTS[3:])
    with monkeypatch.context() as undone:
        undone.setattr(rig.policy.engine, 'reset_prefix_cache', stay)
        rig.swap()
    (stale,) = rig.generate(PROMPTS[3:])
    assert rig.gap(PROMPTS[3], stale) > 1e-2 or rig.mode == 'keep'
    rig.swap()
    (fresh,) = rig.generate(PROMPTS[3:])
    assert rig.gap(PROMPTS[3], fresh) < 1e-4


def test_a_cache_that_stays_is_no_success(rig, monkeypatch):
    if rig.mode == 'keep':
        pytest.skip('nothing is dropped')

    async def refuse(**_):
        return False

    with monkeypatch.context() as stuck:
        stuck.setattr('echo_jax.policy.vllm._CACHE_SECONDS', 0.1)
        stuck.setattr(rig.policy.engine, 'reset_prefix_cache', refuse)
        with pytest.raises(PolicyError, match='prefix cache'):
            rig.swap()
    rig.swap()


def test_a_tied_head_keeps_the_old_weights_unless_it_is_packed_again(rig):
    rig.fail_at('head')
    if rig.learner.tied:
        with pytest.raises(PolicyError, match="probe's log-probabilities are"):
            rig.swap()
    else:
        rig.swap()
    rig.fail_at()
    rig.swap()
    assert rig.policy.swap.probe_gap < 1e-5


def test_a_wrong_probe_is_refused_twice_and_the_next_version_mends_it(rig, caplog):
    good = rig.policy.version
    bad = rig.publish(probe_error=0.01)
    with pytest.raises(PolicyError, match=f'version {bad} .*0.01 nats off .* more than 0.001'):
        rig.run(rig.policy.load(bad))
    assert [f'version {bad}' in r.message for r in caplog.records].count(True) == 1  # one retry
    # What is in the engine is of no version, so nothing is sampled from it.
    with pytest.raises(PolicyError, match=f'version {bad}'):
        rig.generate(PROMPTS[:1])
    assert rig.policy.version == good
    version = rig.swap()
    (generation,) = rig.generate(PROMPTS[1:2])
    assert generation.versions[0] == version and rig.gap(PROMPTS[1], generation) < 1e-4


def test_after_a_refused_version_that_was_collected_turns_wait_for_the_next(rig, monkeypatch):
    bad = rig.publish(probe_error=0.01)
    with monkeypatch.context() as collecting:  # between the first look at it and the second
        warned = 'echo_jax.policy.vllm.logging.warning'
        collecting.setattr(warned, lambda *words: rig.learner.store.rewind(bad - 1))
        with pytest.raises(MissingError):
            rig.run(rig.policy.load(bad))

    async def go_on():
        turn = asyncio.create_task(generate_all(rig.policy, PROMPTS[1:2]))
        await asyncio.sleep(0.2)
        assert not turn.done()  # what is in the engine is of no version
        version = rig.publish()
        await rig.policy.load(version)
        return version, *await turn

    version, generation = rig.run(go_on())
    assert generation.versions[0] == version and rig.gap(PROMPTS[1], generation) < 1e-4


def test_weights_that_stay_when_the_learners_change_are_refused(rig):
    """The probe is within the tolerance, and yet the swap did not take."""
    version = rig.publish()
    rig.run(rig.policy.load(version))
    rig.learner.publish(rig.next, probe_error=1e-4)  # the same weights
    rig.next += 1
    with pytest.raises(PolicyError, match=f"changed since version {version}, vLLM's did not"):
        rig.run(rig.policy.load(version + 1))
    rig.swap()


def test_half_an_update_is_done_once_more(rig, caplog):
    rig.fail_at('half')
    rig.swap()
    assert 'half of it' in caplog.text
    (generation,) = rig.generate(PROMPTS[2:3])
    assert rig.gap(PROMPTS[2], generation) < 1e-4


def test_turns_that_run_end_on_their_version(rig):
    """16 turns under way, a swap, and 16 more that were asked for while it waits."""
    if rig.mode != 'drain':
        pytest.skip('turns are swapped in flight')
    old, new = rig.policy.version, rig.publish()
    prompts = PROMPTS * 4

    async def swap_meanwhile():
        first = asyncio.create_task(generate_all(rig.policy, prompts, max_tokens=200))
        await running(rig.policy, 16, first)
        load = asyncio.create_task(rig.policy.load(new))
        while rig.policy._open.is_set():
            await asyncio.sleep(0.01)
        assert not first.done()
        later = asyncio.create_task(generate_all(rig.policy, prompts))
        return await asyncio.gather(first, later, load)

    first, later, _ = rig.run(swap_meanwhile())
    for generations, version in ((first, old), (later, new)):
        for prompt, generation in zip(prompts, generations):
            assert {*generation.versions.tolist()} == {version}
            assert rig.gap(prompt, generation) < 1e-4
    assert rig.policy.swap.drain_seconds > 0
    # The model's own end of text ends no turn: none of the callers asked for it.
    assert all(g.finish_reason == 'length' and len(g.token_ids) == 200 for g in first)
    assert any(EOS in g.token_ids[:-1] for g in first)


LONG = [*PROMPTS[:2]] * 4  # with the tokens sampled, more than the cache's block in any case


@pytest.fixture
def in_flight(rig):
    if rig.mode == 'drain':
        pytest.skip('turns end before a swap')
    return rig


def test_turns_that_run_go_on_with_new_weights(in_flight, capsys):
    rig, old = in_flight, in_flight.policy.version
    new = rig.publish()
    (turns, problem) = rig.run(interrupted(rig.policy, LONG, new, max_tokens=360))
    assert problem is None and rig.policy.swap.drain_seconds < 1
    after = []
    for prompt, turn in zip(LONG, turns):
        assert len(turn.token_ids) == 360 and (np.diff(turn.versions) >= 0).all()
        gaps = rig.gaps(prompt, turn)
        assert gaps.keys() == {old, new} and gaps[old] < 1e-4
        after.append(gaps[new])
        # A context that a turn of both versions has left in the cache.
        context = [*prompt, *turn.token_ids[:-100]]
        (later,) = rig.generate([context])
        assert {*later.versions.tolist()} == {new} and rig.gap(context, later) < 1e-4
    if rig.mode == 'recompute':
        assert max(after) < 1e-3
    else:  # the keys and values of old weights
        assert min(after) > 1e-3
    with capsys.disabled():
        print(f' {rig.mode}: {max(after):.2g} nats off after a swap', end=' ')


def test_no_token_of_refused_weights_is_given_out(in_flight):
    rig, bad = in_flight, in_flight.publish(probe_error=0.01)
    turns, problem = rig.run(interrupted(rig.policy, LONG, bad, max_tokens=360))
    for error in (turns, problem):
        assert isinstance(error, PolicyError) and f'version {bad} ' in str(error)
    rig.swap()
    (turn,) = rig.generate(PROMPTS[1:2])
    assert rig.gap(PROMPTS[1], turn) < 1e-4


def test_a_turn_that_ends_before_the_probe_waits_for_it(in_flight, monkeypatch):
    """Every turn has ended, the last tokens under the new weights, when these are refused."""
    rig, bad = in_flight, in_flight.publish(probe_error=0.01)
    engine, generate = rig.policy.engine, rig.policy.engine.generate

    async def late(*args, **options):
        is_probe = options['priority'] < 0
        while is_probe and engine.output_processor.get_num_unfinished_requests():
            await asyncio.sleep(0.01)
        async for output in generate(*args, **options):
            yield output

    with monkeypatch.context() as waiting:
        waiting.setattr(engine, 'generate', late)
        turns, problem = rig.run(interrupted(rig.policy, LONG, bad, max_tokens=360))
    assert isinstance(problem, PolicyError) and isinstance(turns, PolicyError)
    rig.swap()


def test_turns_of_refused_weights_are_sampled_again(in_flight):
    """The first attempt leaves half an update, under which the turns go on for a moment."""
    rig, new = in_flight, in_flight.publish()
    rig.fail_at('half')
    turns, problem = rig.run(interrupted(rig.policy, LONG, new, max_tokens=360))
    assert problem is None
    again = rig.generate(LONG, max_tokens=360)
    for prompt, turn, same in zip(LONG, turns, again):
        assert {*turn.versions.tolist()} == {new} and rig.gap(prompt, turn) < 1e-4
        assert turn.token_ids.tolist() == same.token_ids.tolist()


def test_a_swap_that_is_cancelled_leaves_nothing_waiting(in_flight, monkeypatch):
    """Before weights are replaced the old version goes on; after that nothing is given out."""
    rig = in_flight

    async def cancel(owner, method: str):
        begun, is_cancelled = asyncio.Event(), False

        async def hang(*_, **__):
            begun.set()
            await asyncio.sleep(3600)

        async def sample():  # until the swap has been cancelled, however long that takes
            turns = None
            while not is_cancelled or method == '_prompt_logprobs':  # which ends in an error
                turns = await generate_all(rig.policy, LONG, max_tokens=360)
            return turns

        sampling = asyncio.create_task(sample())
        await running(rig.policy, len(LONG), sampling)
        with monkeypatch.context() as hanging:
            hanging.setattr(owner, method, hang)
            load = asyncio.create_task(rig.policy.load(rig.publish()))
            await begun.wait()
            load.cancel()
            with pytest.raises(asyncio.CancelledError):
                await load
        is_cancelled = True
        return await sampling

    old = rig.policy.version
    try:
        turns = rig.run(cancel(rig.policy.engine, 'pause_generation'))
        assert all({*turn.versions.tolist()} == {old} for turn in turns)
        with pytest.raises(PolicyError, match='not loaded to its end'):
            rig.run(cancel(rig.policy, '_prompt_logprobs'))
    finally:
        rig.swap()  # and the tests after this one have an engine


def test_a_seed_repeats_its_sample(rig):
    again = [rig.generate([PROMPTS[2]], max_tokens=40, seed=s)[0].token_ids for s in (5, 5, 6)]
    assert np.array_equal(again[0], again[1]) and not np.array_equal(again[1], again[2])
    (large,) = rig.generate([PROMPTS[0]], seed=2**63 - 1)  # docs/protocol.md#a-turn: 63 bits
    assert len(large.token_ids) == 16


def test_more_prompts_than_one_step_takes(rig):
    """4,800 tokens at once: vLLM would prefill one prompt in parts, and on a CPU die of it."""
    prompts = RNG.integers(0, VOCAB, (16, 300))
    for prompt, generation in zip(prompts, rig.generate(prompts, max_tokens=4)):
        assert rig.gap(prompt, generation) < 1e-4


def test_a_stop_token_is_in_the_result(rig):
    (greedy,) = rig.generate([PROMPTS[1]], temperature=0.0, max_tokens=8)
    stop = greedy.token_ids[5]
    (stopped,) = rig.generate([PROMPTS[1]], temperature=0.0, max_tokens=8, stop=(499, int(stop)))
    length = greedy.token_ids.tolist().index(stop) + 1
    assert stopped.token_ids.tolist() == greedy.token_ids[:length].tolist()
    assert (stopped.finish_reason, greedy.finish_reason) == ('stop', 'length')


def test_a_context_that_does_not_fit_is_refused(rig):
    with pytest.raises(ValueError, match='500 tokens and max_tokens=16 do not fit'):
        rig.generate([RNG.integers(0, VOCAB, 500)])
    with pytest.raises(ValueError, match='a context of 0 tokens'):
        rig.generate([[]])


def test_a_cancelled_turn_frees_its_request(rig):
    async def cancel():
        task = asyncio.create_task(generate_all(rig.policy, PROMPTS[:2], max_tokens=200))
        await running(rig.policy, 2, task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.policy.engine.output_processor.get_num_unfinished_requests() == 0
        started = time.monotonic()
        assert await rig.policy._drop_prefixes()  # no block of it is in use
        return time.monotonic() - started

    assert rig.run(cancel()) < 1.0
    rig.swap()  # and no swap waits for it


def test_a_damaged_or_absent_version_changes_nothing(rig):
    good, bad = rig.policy.version, rig.publish()
    newest, data = rig.learner.store.newest()
    assert newest == bad
    chunks = (rig.learner.model_dir.parent / 'weights' / 'data' / f'{bad:010d}' / data).rglob('c*')
    chunk = max((path for path in chunks if path.is_file()), key=lambda path: path.stat().st_size)
    damaged = bytearray(chunk.read_bytes())
    damaged[100] ^= 1
    chunk.write_bytes(damaged)
    with pytest.raises(CorruptError, match=f'version {bad} in .* is corrupt'):
        rig.run(rig.policy.load(bad))
    rig.learner.store.rewind(bad - 1)
    with pytest.raises(MissingError, match=f'version {bad} is not in'):
        rig.run(rig.policy.load(bad))
    (generation,) = rig.generate(PROMPTS[1:2])
    assert generation.versions[0] == good and rig.gap(PROMPTS[1], generation) < 1e-4


async def turns_that_fail(policy, end) -> float:
    """Seconds from `end()`, which ends the engine, to errors from every call."""
    turns = asyncio.create_task(generate_all(policy, PROMPTS, max_tokens=200))
    await running(policy, len(PROMPTS), turns)
    end()
    started = time.monotonic()
    with pytest.raises(PolicyError, match="vLLM's engine failed"):
        await turns
    for failing in (policy.load(policy.version), generate_all(policy, PROMPTS)):
        with pytest.raises(PolicyError):
            await failing
    return time.monotonic() - started


def test_an_engine_that_died_fails_every_turn(rig):
    """It stands last of those that share an engine, because it kills the engine."""

    def kill():
        for process in multiprocessing.active_children():
            process.kill()

    assert rig.run(turns_that_fail(rig.policy, kill)) < 10
