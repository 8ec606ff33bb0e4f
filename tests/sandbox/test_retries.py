"""What is tried again, how often, and for how long an engine that is away is waited for."""

import asyncio
import dataclasses
import itertools
import types

import pytest

from echo_jax.agent.episode import run_group
from echo_jax.agent.protocol import Protocol
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.run.oracle import run_without_model
from echo_jax.sandbox import SandboxError, SandboxUnavailable, docker, retries
from echo_jax.sandbox.retries import with_retries
from echo_jax.types import Status
from tests.support import docker_engine
from tests.support.episodes import DONE, bash


def tries(errors, during=lambda: None, **bounds) -> int:
    """How many tries it took until one ended well, after these errors. Each calls `during`."""
    left, made = iter(errors), itertools.count(1)

    async def attempt() -> int:
        number = next(made)
        during()
        if error := next(left, None):
            raise error
        return number

    return asyncio.run(with_retries(attempt, 'sample 0', **bounds))


def test_a_failed_sandbox_is_tried_again_as_often_as_said(caplog):
    failed = SandboxError('no space left')
    assert tries([]) == 1
    assert tries([failed] * 2, retry_after=(0.0, 0.0)) == 3
    with pytest.raises(SandboxError, match='no space left'):
        tries([failed] * 3, retry_after=(0.0, 0.0))
    assert 'sample 0, try 3 of 3: no space left' in caplog.text


def test_what_no_other_sandbox_would_do_better_is_not_tried_again():
    with pytest.raises(ValueError, match='no such file'):
        tries([ValueError('no such file')], retry_after=(0.0,))


def test_an_engine_that_is_away_costs_no_try(caplog, monkeypatch):
    monkeypatch.setattr(retries, 'ASK_AGAIN_SEC', 0.01)
    failed, away = SandboxError('died'), SandboxUnavailable('no engine')
    assert tries([failed, away, away, failed], retry_after=(0.0, 0.0)) == 5
    assert caplog.text.count('no engine') == 1  # said once


def test_an_engine_that_stays_away_is_not_waited_for_forever(monkeypatch):
    """Each try takes a minute of this test's own clock, as with an engine that hangs."""
    now = 0

    def hang() -> None:
        nonlocal now
        now += 60

    monkeypatch.setattr(retries, 'ASK_AGAIN_SEC', 0.01)
    monkeypatch.setattr(retries, 'time', types.SimpleNamespace(monotonic=lambda: now))
    away, failed = SandboxUnavailable('no engine'), SandboxError('died')
    # The sixth error comes 300 s after the first.
    assert tries([away] * 5, hang, away_sec=300) == 6
    with pytest.raises(SandboxUnavailable):
        tries([away] * 6, hang, away_sec=300)
    # If the engine is back in between, it is waited for anew.
    errors = [*[away] * 5, failed, *[away] * 5]
    assert tries(errors, hang, away_sec=300, retry_after=(0.0,)) == 12


def test_an_engine_that_refuses_something_is_not_away(used):
    with pytest.raises(SandboxError, match='no command specified') as caught:
        used.blocking(used.client.api.create_container, docker_engine.BASE)
    assert not isinstance(caught.value, SandboxUnavailable)


@pytest.mark.slow
def test_a_group_and_an_oracle_outlive_an_engine_that_is_killed(
    task, made, used, daemon, tiny_tokenizer, protocol_config
):
    """Both use up all their tries, which is none here, if its absence counts as one."""
    if daemon.process is None:
        pytest.skip('the engine is not ours to kill')
    daemon.kill()
    policy = ScriptedPolicy(tiny_tokenizer, [bash('true'), DONE])
    task = dataclasses.replace(task, environment_only=True)

    def make(task):
        return docker.PlainSandbox(task, images=made[None])

    async def main():
        group = run_group(
            task,
            0,
            policy=policy,
            make_sandbox=make,
            protocol=Protocol(tiny_tokenizer, protocol_config),
            group_size=2,
            seed=0,
            temperature=1.0,
            sandboxes=asyncio.Semaphore(2),
            retry_after=(),
        )
        checked = run_without_model([task], make, oracle=False, at_once=1)
        both = asyncio.gather(group, checked)
        await asyncio.sleep(3.0)
        await asyncio.to_thread(daemon.start)
        return await both

    rollouts, (outcome,) = asyncio.run(main())
    assert [rollout.status for rollout in rollouts] == [Status.OK] * 2
    assert outcome.reason == 'task has no tests/'  # the container was there
    docker.sweep(used)
