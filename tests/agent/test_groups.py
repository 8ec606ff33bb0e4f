"""Groups of episodes: failures that are tried again, cancellation, a policy that breaks."""

import asyncio
import dataclasses
import time

import pytest

from echo_jax.agent.episode import run_group
from echo_jax.agent.protocol import Protocol
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.local import LocalSandbox
from echo_jax.types import Role, Status
from tests.support.episodes import DONE, assert_valid, bash


class Counted(LocalSandbox):
    """A real sandbox that counts lives, and whose first `failures` starts fail."""

    failures, most, begun = 0, 0, 0

    def __init_subclass__(cls):
        cls.alive, cls.stopped = set(), set()

    async def start(self):
        cls = type(self)
        cls.begun += 1
        cls.alive.add(self)
        cls.most = max(cls.most, len(cls.alive))
        await super().start()
        if cls.failures > 0:
            cls.failures -= 1
            raise SandboxError('no space left on the machine')

    async def stop(self):  # more than once where start() fails
        await super().stop()
        await asyncio.sleep(0.2)  # a container takes its time, and a cancellation may come in it
        type(self).alive.discard(self)
        type(self).stopped.add(self)


def group(task, policy, protocol, sandbox, *, size=4, at_once=2):
    return run_group(
        task,
        9,
        policy=policy,
        make_sandbox=sandbox,
        protocol=protocol,
        group_size=size,
        seed=5,
        temperature=1.0,
        sandboxes=asyncio.Semaphore(at_once),
        retry_after=(0.0, 0.1),
    )


@pytest.mark.slow
@pytest.mark.parametrize('failures', [0, 2, 100])
def test_a_group_retries_and_then_records(make_task, tiny_tokenizer, protocol_config, failures):
    sandbox = type('Sandbox', (Counted,), {'failures': failures})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('echo 42 > /app/answer.txt'), DONE])
    protocol = Protocol(tiny_tokenizer, protocol_config)
    task = dataclasses.replace(make_task(), environment_only=True)

    async def run():
        return await group(task, policy, protocol, sandbox)

    rollouts = asyncio.run(run())
    assert [rollout.sample_id for rollout in rollouts] == [0, 1, 2, 3]
    for rollout in rollouts:
        assert_valid(rollout)
        assert rollout.environment_only is True  # also when nothing was sampled
        if failures < 100:
            # The tests of an environment-only task are not run.
            assert (rollout.reward, rollout.status, rollout.group_id) == (0.0, Status.OK, 9)
        else:
            assert rollout.status == Status.INFRA_ERROR and rollout.reward == 0
            assert rollout.reason == 'no space left on the machine'
            assert rollout.tokens.tolist() == protocol.prompt_ids('Write 42 to /app/answer.txt.')
            assert (rollout.roles == Role.PROMPT).all() and len(rollout.turn_starts) == 0
    assert sandbox.most == 2 and not sandbox.alive
    assert sandbox.begun == len(sandbox.stopped) == {0: 4, 2: 6, 100: 12}[failures]


@pytest.mark.parametrize(
    'error',
    [
        ValueError('COPY none: there is\nno such file'),
        OSError('no such device'),
        UnicodeDecodeError('utf-8', b'\xff', 0, 1, 'invalid start byte'),
        KeyError('x'),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize('where', ['make', 'start', 'run', 'verify'])
def test_whatever_a_task_or_its_sandbox_raises_is_an_infra_error(
    make_task, tiny_tokenizer, protocol_config, error, where
):
    class Faulty(LocalSandbox):
        pass

    async def fail(self, *arguments):
        raise error

    def make(task):
        if where == 'make':
            raise error
        return Faulty(task)

    if where != 'make':
        setattr(Faulty, where, fail)
    protocol = Protocol(tiny_tokenizer, protocol_config)

    async def run():
        policy = ScriptedPolicy(tiny_tokenizer, [bash('true'), DONE])
        return await group(make_task(), policy, protocol, make, size=2)

    for rollout in asyncio.run(run()):
        assert_valid(rollout)
        assert (rollout.status, rollout.reward) == (Status.INFRA_ERROR, 0.0)
        assert rollout.reason == (' '.join(str(error).split()) or 'RuntimeError')
        assert rollout.metrics == {
            'infra_retries': 0.0,
            f'error/{type(error).__name__}': 1.0,
        }  # no other sandbox would do better


def test_cancelling_stops_the_sandboxes(make_task, tiny_tokenizer, protocol_config):
    sandbox = type('Sandbox', (Counted,), {})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('sleep 60', 50), DONE])

    async def run():
        protocol = Protocol(tiny_tokenizer, protocol_config)
        task = asyncio.create_task(group(make_task(), policy, protocol, sandbox))
        while len(sandbox.alive) < 2:
            await asyncio.sleep(0.05)
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    started = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - started < 20
    assert sandbox.begun == len(sandbox.stopped) == 2 and not sandbox.alive


def test_a_broken_policy_ends_the_group_and_its_sandboxes(
    make_task, tiny_tokenizer, protocol_config
):
    sandbox = type('Sandbox', (Counted,), {})
    policy = ScriptedPolicy(tiny_tokenizer, [bash('true')])  # has no second turn

    async def run():
        await group(make_task(), policy, Protocol(tiny_tokenizer, protocol_config), sandbox)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(run())
    assert raised.group_contains(ValueError, match='end it with done')
    assert sandbox.begun == len(sandbox.stopped) and not sandbox.alive


def test_a_policy_that_gives_too_few_numbers_ends_the_group(
    make_task, tiny_tokenizer, protocol_config
):
    class Short(ScriptedPolicy):
        async def generate(self, token_ids, **arguments):
            generation = await super().generate(token_ids, **arguments)
            return generation._replace(logprobs=generation.logprobs[1:])

    sandbox = type('Sandbox', (Counted,), {})

    async def run():
        policy = Short(tiny_tokenizer, [DONE])
        await group(make_task(), policy, Protocol(tiny_tokenizer, protocol_config), sandbox)

    with pytest.raises(ExceptionGroup) as raised:
        asyncio.run(run())
    assert raised.group_contains(ValueError, match='the policy must give one of each a token')
    assert sandbox.begun == len(sandbox.stopped) and not sandbox.alive
