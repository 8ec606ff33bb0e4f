"""Draws the groups that a rollout store lacks, and writes each when its rollouts have ended."""

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
    policy: Policy | Callable[[Task], Policy],
    group_size: int,
    temperature: float,
    sandboxes: asyncio.Semaphore | None = None,
    on_group: Callable[[list[Rollout]], None] = lambda group: None,
) -> None:
    """Draws every group that the store lacks and writes it; `on_group` sees each as it is written.

    `policy` may be a function of the task. At most `sandbox.at_once` sandboxes live at one time, or
    as many as `sandboxes` lets, which calls may share.
    """
    assignments = dict(assignments)
    sandboxes = sandboxes or asyncio.Semaphore(config.sandbox.at_once)

    async def draw(group_id: int, task: Task) -> None:
        group = await run_group(
            task,
            group_id,
            policy=policy if hasattr(policy, 'generate') else policy(task),
            make_sandbox=make_sandbox,
            protocol=protocol,
            group_size=group_size,
            seed=config.seed,
            temperature=temperature,
            sandboxes=sandboxes,
        )
        await asyncio.to_thread(store.write_group, group)
        on_group(group)

    async with asyncio.TaskGroup() as running:
        for group_id in await asyncio.to_thread(store.missing, assignments):
            running.create_task(draw(group_id, assignments[group_id]))
