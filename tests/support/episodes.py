"""Scripted episodes of a hand-made task in real sandboxes, and what came of them."""

import asyncio

import numpy as np
import pytest

from echo_jax.agent.episode import run_episode
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.sandbox.local import LocalSandbox
from echo_jax.tasks.harbor import load_task
from echo_jax.types import Role

CHECK = '[ "$(cat /app/answer.txt)" = 42 ] && echo 1 > $R || echo 0 > $R\n'
DONE = format_reply('Finished.', done=True)


def bash(command, timeout=None):
    extra = f'\n<parameter=timeout>\n{timeout}\n</parameter>' if timeout is not None else ''
    return (
        'I act.\n</think>\n\n<tool_call>\n<function=bash>\n<parameter=command>\n'
        f'{command}\n</parameter>{extra}\n</function>\n</tool_call>'
    )


def call(inner):
    return f'I act.\n</think>\n\n<tool_call>\n{inner}\n</tool_call>'


@pytest.fixture
def make_task(tmp_path):
    def make(test_sh=CHECK, agent_timeout=60.0, verifier_timeout=20.0):
        path = tmp_path / 'answer'
        for folder in ('environment', 'tests', 'solution'):
            (path / folder).mkdir(parents=True, exist_ok=True)
        (path / 'task.toml').write_text(
            f'[agent]\ntimeout_sec = {agent_timeout}\n'
            f'[verifier]\ntimeout_sec = {verifier_timeout}\n'
        )
        (path / 'instruction.md').write_text('Write 42 to /app/answer.txt.')
        (path / 'environment/Dockerfile').write_text('FROM debian:bookworm-slim\nWORKDIR /app\n')
        (path / 'solution/solve.sh').write_text('#!/bin/bash\necho 42 > /app/answer.txt\n')
        (path / 'tests/test.sh').write_text(
            f'#!/bin/bash\nR=/logs/verifier/reward.txt\nJ=/logs/verifier/reward.json\n{test_sh}'
        )
        return load_task(path)

    return make


class Recording:
    """A policy that keeps what each turn was asked with; the turns themselves are scripted."""

    def __init__(self, policy, delay=0.0):
        self.policy, self.delay, self.calls = policy, delay, []

    async def generate(self, token_ids, **arguments):
        self.calls.append((token_ids.tolist(), arguments))
        await asyncio.sleep(self.delay)
        return await self.policy.generate(token_ids, **arguments)


class Episodes:
    """Runs scripts against one task and decodes what came of them."""

    def __init__(self, tokenizer, config):
        self.tokenizer, self.config = tokenizer, config

    def run(self, task, replies, *, delay=0.0):
        self.policy = Recording(ScriptedPolicy(self.tokenizer, replies), delay)
        return asyncio.run(
            run_episode(
                task,
                self.policy,
                LocalSandbox(task),
                Protocol(self.tokenizer, self.config),
                group_id=3,
                sample_id=1,
                seed=5,
                temperature=0.8,
            )
        )

    def observations(self, rollout):
        """What each observation showed, in order."""
        text = self.tokenizer.decode(rollout.tokens)
        shown = text.split('<tool_response>\n')[1:]
        return [part.split('\n</tool_response>')[0] for part in shown]

    def words(self, rollout, role):
        return self.tokenizer.decode(rollout.tokens[rollout.roles == role])


@pytest.fixture
def episodes(tiny_tokenizer, protocol_config):
    return Episodes(tiny_tokenizer, protocol_config)


def assert_valid(rollout):
    """The invariants of docs/design.md#rollout."""
    shape = rollout.tokens.shape
    assert rollout.tokens.dtype == np.int32 and rollout.roles.dtype == np.uint8
    assert rollout.rollout_logprobs.dtype == np.float32 and rollout.rollout_logprobs.shape == shape
    assert rollout.policy_versions.dtype == np.int32 and rollout.policy_versions.shape == shape
    assert rollout.turn_starts.dtype == np.int32
    action = rollout.roles == Role.ACTION
    assert np.all((rollout.policy_versions >= 0) == action)
    assert all(action[i] and not action[i - 1] for i in rollout.turn_starts)
    assert all(type(value) is float for value in rollout.metrics.values())
