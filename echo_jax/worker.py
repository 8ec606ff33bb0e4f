"""A rollout worker: task groups in, groups of rollouts in the store.

The learner's program runs it in its own process on one machine. A group is written when all its
rollouts are there; one that the store has already is not drawn again, so a killed run goes on.
"""

import asyncio
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import ml_collections

from echo_jax.agent.episode import run_group
from echo_jax.agent.families import practice
from echo_jax.agent.policy import Policy
from echo_jax.agent.policy.scripted import ScriptedPolicy
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.agent.sandbox import Sandbox, local
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Task

Assignments = Iterable[tuple[int, Task]]  # a group's id and its task


def sandbox_maker(
    config: ml_collections.ConfigDict, *, run: str = '', worker: str = ''
) -> Callable[[Task], Sandbox]:
    """What makes the sandbox of a task; fails early where this machine allows none.

    `run` and `worker` label what a Docker engine keeps for it (docker.py: sweep).
    """
    limits = {key: config.sandbox[key] for key in ('processes', 'memory_mb', 'disk_mb')}
    match config.sandbox.backend:
        case 'local':
            local.check()
            return functools.partial(local.LocalSandbox, **limits)
        case 'docker':
            images = docker_images(run, worker)
            from echo_jax.agent.sandbox import docker

            return functools.partial(docker.DockerSandbox, images=images, **limits)
        case 'harbor':
            from echo_jax.agent.sandbox import harbor

            harbor.check(config.sandbox.harbor_environment)
            return functools.partial(
                harbor.HarborSandbox,
                environment=config.sandbox.harbor_environment,
                memory_mb=limits['memory_mb'],
                disk_mb=limits['disk_mb'],
            )
        case backend:
            raise ValueError(
                f"sandbox.backend is {backend!r}; expected 'local', 'docker' or 'harbor'"
            )


def docker_images(run: str = '', worker: str = ''):
    """The images.Images of the engine at DOCKER_HOST; fails where it or the Docker SDK is not."""
    try:  # here: no other backend needs the SDK
        from echo_jax.agent.sandbox import engine, images
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sandbox.backend='docker' needs the Docker SDK ({error}); pip install docker"
        ) from error
    return images.Images(engine.Engine(run=run, worker=worker))


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
    on_group: Callable[[list[Rollout]], None] = lambda group: None,
) -> None:
    """Draws every group that the store lacks and writes it; `on_group` sees each as it is written.

    `policy` may be a function of the task. At most `sandbox.at_once` sandboxes live at one time.
    """
    sandboxes = asyncio.Semaphore(config.sandbox.at_once)
    there = set(store.groups())

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
        for group_id, task in assignments:
            if group_id not in there:
                running.create_task(draw(group_id, task))


def waves(assignments: Assignments, group_size: int, slots: int) -> Iterator[list]:
    """The assignments in lists whose episodes each have a slot of the embedded policy.

    Beyond that an episode may lose its slot to another, by chance, and is prefilled anew: the same
    tokens, but not the same bits. So each list is collected before the next.
    """
    assignments, size = list(assignments), max(1, slots // group_size)
    return (assignments[i : i + size] for i in range(0, len(assignments), size))


def demonstrator(tokenizer, habits: Sequence[str]) -> Callable[[Task], ScriptedPolicy]:
    """Policies that replay a task's own solution, a command a turn, by the habits in turn.

    A task always gets the same habit: by the number in its id, else by the length of its id.
    """

    def policy(task: Task) -> ScriptedPolicy:
        digits = re.search(r'\d+', task.task_id)
        number = int(digits[0]) if digits else len(task.task_id)
        turns = practice(task, habits[number % len(habits)])
        return ScriptedPolicy(tokenizer, [format_reply(*turn) for turn in turns])

    return policy
