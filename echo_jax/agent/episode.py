"""One episode of a task, and the episodes of a group (docs/protocol.md#a-turn).

Sees policy and sandbox only through their interfaces (docs/design.md#policy-and-sandbox). It trains
nothing and stores nothing.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from echo_jax.agent.encoding import Span
from echo_jax.agent.observations import NO_COMMANDS, execute
from echo_jax.agent.protocol import Conversation, Protocol, turn_seed, warning_prefix
from echo_jax.policy import Policy
from echo_jax.sandbox import Sandbox, SandboxError, Verdict
from echo_jax.sandbox.retries import RETRY_AFTER, with_retries
from echo_jax.types import SOLVED_REWARD, Role, Rollout, Status, Task

_REASON_CHARS = 1_000  # of an error's message that are kept
_DISCARDED = Verdict(0.0, Status.OK, 'discarded: a budget was spent, and no test was run')
# Reasons for the end of the agent's part, and the status that each gives the episode.
_STATUS = {
    'done': Status.OK,
    'max_turns': Status.TRUNCATED,
    'max_context_tokens': Status.TRUNCATED,
    'max_total_tokens': Status.TRUNCATED,
    'agent_timeout': Status.AGENT_TIMEOUT,
}

_NO_VERDICT = Verdict(reward=0.0, status=Status.OK)  # of an environment_only task


@dataclasses.dataclass
class _Counts:
    """The metrics of one episode; seconds of wall clock."""

    turns: int = 0
    turns_cut: int = 0  # by max_turn_tokens
    parse_errors: int = 0  # turns answered by a whole-response error
    warnings: int = 0
    imagined: int = 0  # turns with an observation that the agent made up
    commands: int = 0  # really run
    seconds_sampling: float = 0.0
    seconds_executing: float = 0.0
    seconds_verifying: float = 0.0


async def run_episode(
    task: Task,
    policy: Policy,
    sandbox: Sandbox,
    protocol: Protocol,
    *,
    group_id: int,
    sample_id: int,
    seed: int,
    temperature: float,
) -> Rollout:
    """Starts the sandbox, lets the policy work in it, verifies, and in any case stops the sandbox.

    docs/protocol.md#budgets says what a spent budget means, by `protocol.at_max_total_tokens` and
    `protocol.at_agent_timeout`; after any other end the verifier runs, but not for a task that is
    `environment_only`, whose reward nobody reads and which is 0 then. `seed` is the run's.

    Raises PolicyFailed if the policy fails. What else it raises is the fault of the task or of its
    sandbox; run_group tries again after a SandboxError.
    """
    conversation, counts = protocol.start(task.instruction), _Counts()
    episode = _Episode(
        policy, sandbox, conversation, counts, temperature, (seed, group_id, sample_id)
    )
    discards = protocol.config.at_agent_timeout == 'discard'
    clock = asyncio.timeout(task.agent_timeout_sec if discards else None)
    try:
        async with clock:
            ending, verdict = await episode.run(task)
    except TimeoutError:
        if not clock.expired():
            raise
        ending, verdict = 'agent_timeout', _DISCARDED
    finally:
        await _stop(sandbox)
    if discards and ending == 'agent_timeout':
        conversation = protocol.start(task.instruction)  # of the rest, no token is trained on
    metrics = dataclasses.asdict(counts) | {'imagined': counts.imagined / max(counts.turns, 1)}
    metrics |= {f'stop/{reason}': reason == ending for reason in _STATUS}
    metrics |= {f'reward/{key}': value for key, value in verdict.rewards.items() if key != 'reward'}
    if not task.environment_only:
        metrics['correct'] = verdict.reward >= SOLVED_REWARD
    return _rollout(
        conversation,
        reward=verdict.reward - length_penalty(conversation, protocol.config),
        status=_STATUS[ending] if verdict.status == Status.OK else verdict.status,
        reason=verdict.reason,
        tests_output=verdict.output,
        task_id=task.task_id,
        group_id=group_id,
        sample_id=sample_id,
        environment_only=task.environment_only,
        metrics={name: float(value) for name, value in metrics.items()},
    )


class PolicyFailed(Exception):
    """The policy failed, for the reason that is this error's cause."""


async def _stop(sandbox: Sandbox) -> None:
    """Waits until the sandbox has stopped, even if the episode is cancelled in the meantime.

    A plain `await sandbox.stop()` would be cut off by the cancellation and leave the sandbox alive.
    """
    stopping = asyncio.ensure_future(sandbox.stop())
    cancelled = None
    while not stopping.done():
        try:
            await asyncio.wait({stopping})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    stopping.result()


@dataclasses.dataclass
class _Episode:
    """The agent's part of an episode, turn after turn."""

    policy: Policy
    sandbox: Sandbox
    conversation: Conversation
    counts: _Counts
    temperature: float
    seeds: tuple[int, int, int]  # the run's seed, group_id, sample_id

    async def run(self, task: Task) -> tuple[str, Verdict]:
        """(why the agent's part ended, what the tests said), from the start of the sandbox on.

        The agent's time begins once the sandbox has started, or, if an episode
        that takes longer is discarded, before that, and the tests are in it too: the caller ends
        these by then.
        """
        config = self.conversation.protocol.config
        began = time.monotonic()
        await self.sandbox.start()
        if config.at_agent_timeout == 'verify':
            began = time.monotonic()
        ending = await self.converse(began + task.agent_timeout_sec)
        if task.environment_only:
            return ending, _NO_VERDICT
        if ending in ('agent_timeout', 'max_total_tokens') and config[f'at_{ending}'] == 'discard':
            return ending, _DISCARDED
        started = time.monotonic()
        try:
            return ending, await self.sandbox.verify()
        finally:
            self.counts.seconds_verifying = time.monotonic() - started

    async def converse(self, deadline: float) -> str:
        """Takes turns until there is a reason to end, a key of _STATUS, which is returned.

        `deadline` is in seconds of time.monotonic().
        """
        conversation, config = self.conversation, self.conversation.protocol.config
        for turn in range(config.max_turns):
            left = config.max_total_tokens - len(conversation.tokens)
            if left <= 0:
                return 'max_total_tokens'
            if len(conversation.context) >= config.max_context_tokens:
                return 'max_context_tokens'
            started = time.monotonic()
            if started >= deadline:
                return 'agent_timeout'
            clock = asyncio.timeout(deadline - started)
            try:
                async with clock:
                    generation = await self.policy.generate(
                        np.asarray(conversation.context, np.int32),
                        max_tokens=min(config.max_turn_tokens, left),
                        temperature=self.temperature,
                        seed=turn_seed(*self.seeds, turn),
                        stop_token_ids=conversation.protocol.stop_token_ids,
                    )
                conversation.append_turn(generation)  # its error is the policy's
            except TimeoutError as error:
                if not clock.expired():  # the policy raised it, and the agent still has time
                    raise PolicyFailed from error
                return 'agent_timeout'
            except Exception as error:
                raise PolicyFailed from error
            finally:
                self.counts.seconds_sampling += time.monotonic() - started
            self.counts.turns += 1
            self.counts.turns_cut += generation.finish_reason == 'length'
            ending, observation = await self._act(generation.token_ids, deadline)
            if ending:
                return ending
            if not conversation.append_observation(observation):
                return 'max_total_tokens'
        return 'max_turns'

    async def _act(self, token_ids: np.ndarray, deadline: float) -> tuple[str, list[Span]]:
        """Does what a turn asks for: (why the episode ends, '' if it does not; observation)."""
        protocol, counts = self.conversation.protocol, self.counts
        response, warnings, imagined = protocol.read_turn(token_ids)
        counts.warnings += len(warnings)
        counts.imagined += imagined
        if response.error:
            counts.parse_errors += 1
            return '', [Span(Role.FEEDBACK, response.error)]
        started = time.monotonic()
        selected = protocol.select(response.commands)
        output, commands = await execute(selected, self.sandbox, protocol.config, deadline)
        counts.commands += commands
        counts.seconds_executing += time.monotonic() - started
        if time.monotonic() >= deadline:
            return 'agent_timeout', []
        if response.is_done:
            return 'done', []
        return '', [*warning_prefix(warnings), *(output or [NO_COMMANDS])]


def length_penalty(conversation: Conversation, config: ml_collections.ConfigDict) -> float:
    """What is taken off the reward for a long rollout (docs/protocol.md#reward).

    It is `length_penalty_coef` for every 1,000 tokens after the prompt beyond
    `length_penalty_start`; a coefficient of 0 turns it off.
    """
    if not config.length_penalty_coef:
        return 0.0
    after_prompt = len(conversation.tokens) - conversation.roles.count(Role.PROMPT)
    excess = max(after_prompt - config.length_penalty_start, 0)
    return config.length_penalty_coef * excess / 1000


def _rollout(conversation: Conversation, **fields) -> Rollout:
    return Rollout(
        tokens=np.asarray(conversation.tokens, np.int32),
        roles=np.asarray(conversation.roles, np.uint8),
        rollout_logprobs=np.asarray(conversation.logprobs, np.float32),
        policy_versions=np.asarray(conversation.versions, np.int32),
        turn_starts=np.asarray(conversation.turn_starts, np.int32),
        **fields,
    )


async def run_group(
    task: Task,
    group_id: int,
    *,
    policy: Policy,
    make_sandbox: Callable[[Task], Sandbox],
    protocol: Protocol,
    group_size: int,
    seed: int,
    temperature: float,
    sandboxes: asyncio.Semaphore,
    retry_after: Sequence[float] = RETRY_AFTER,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
) -> list[Rollout]:
    """The rollouts of one group, drawn at the same time, in the order of their sample_id.

    `sandboxes` is shared by all groups of a process and bounds the sandboxes that live at a time.
    `on_rollout` is called with each rollout when it has ended.
    After a SandboxError the sample is drawn again in a fresh sandbox (`with_retries`, which has
    `retry_after`); if the last try fails too, it becomes an INFRA_ERROR with nothing
    but the prompt in it, and the error as its reason. Any other error of the task or of its sandbox
    (a link that leads outside, a file that cannot be read) makes it one at once, since no other
    sandbox would do better. What the policy raises ends the whole group.
    """

    async def run_sample(sample_id: int) -> Rollout:
        async with sandboxes:
            return await run_episode(
                task,
                policy,
                make_sandbox(task),
                protocol,
                group_id=group_id,
                sample_id=sample_id,
                seed=seed,
                temperature=temperature,
            )

    def infra_error(sample_id: int, error: Exception, retries: int) -> Rollout:
        reason = ' '.join(str(error).split()) or type(error).__name__
        return _rollout(
            protocol.start(task.instruction),
            reward=0.0,
            status=Status.INFRA_ERROR,
            reason=reason[:_REASON_CHARS],
            task_id=task.task_id,
            group_id=group_id,
            sample_id=sample_id,
            environment_only=task.environment_only,
            metrics={'infra_retries': float(retries), f'error/{type(error).__name__}': 1.0},
        )

    async def draw(sample_id: int) -> Rollout:
        name, tries = f'task {task.task_id}, group {group_id}, sample {sample_id}', 0

        async def attempt() -> Rollout:
            nonlocal tries
            tries += 1
            return await run_sample(sample_id)

        try:
            return await with_retries(attempt, name, retry_after=retry_after)
        except PolicyFailed as error:
            raise error.__cause__ or error from None
        except Exception as error:  # one bad task never ends a run, whatever is wrong with it
            if not isinstance(error, SandboxError):  # which is in the log already
                logging.warning('%s: %r', name, error)
            return infra_error(sample_id, error, tries - 1)

    async def draw_and_tell(sample_id: int) -> Rollout:
        rollout = await draw(sample_id)
        on_rollout(rollout)
        return rollout

    async with asyncio.TaskGroup() as running:
        samples = [running.create_task(draw_and_tell(i)) for i in range(group_size)]
    return [sample.result() for sample in samples]
