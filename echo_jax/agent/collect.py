"""Draws the groups that a rollout store lacks, and writes each when its rollouts have ended.

Chooses no tasks and no weights: callers do.
"""

import asyncio
from collections.abc import Callable, Iterable

import ml_collections

from echo_jax.agent.episode import run_group
from echo_jax.agent.protocol import Protocol
from echo_jax.policy import Policy
from echo_jax.sandbox import Sandbox
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Task

Assignments = Iterable[tuple[int, Task]]  # a group's id and its task


async def collect(
    assignments: Assignments,
    store: RolloutStore,
    *,
    config: ml_collections.ConfigDict,
    make_sandbox: Callable[[Task], Sandbox],
    protocol: Protocol,
    policy_for: Callable[[Task], Policy],
    group_size: int,
    temperature: float,
    sandboxes: asyncio.Semaphore | None = None,
    on_group: Callable[[list[Rollout]], None] = lambda group: None,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
) -> None:
    """Draws and writes every group that the store lacks, and calls `on_group` with each then, and
    `on_rollout` with each of its rollouts when that has ended.

    `policy_for` gives the policy of a task. At most `sandbox.at_once` sandboxes live at one time,
    unless `sandboxes` is given, a limit that several calls can share. An error of the policy or of
    the store ends all, in an ExceptionGroup; groups that are written by then stay. One of a task or
    of its sandbox does not: its rollout is an INFRA_ERROR (`run_group`).
    """
    tasks = dict(assignments)
    sandboxes = sandboxes or asyncio.Semaphore(config.sandbox.at_once)

    async def draw(group_id: int, task: Task) -> None:
        group = await run_group(
            task,
            group_id,
            policy=policy_for(task),
            make_sandbox=make_sandbox,
            protocol=protocol,
            group_size=group_size,
            seed=config.seed,
            temperature=temperature,
            sandboxes=sandboxes,
            on_rollout=on_rollout,
        )
        await asyncio.to_thread(store.write_group, group)
        on_group(group)

    async with asyncio.TaskGroup() as running:
        for group_id in await asyncio.to_thread(store.missing, tasks):
            running.create_task(draw(group_id, tasks[group_id]))
