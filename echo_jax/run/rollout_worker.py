"""A rollout worker: an engine that follows the published weights and draws the groups that are due.

The program `echo_jax.worker` and the Ray fleet (launch/ray) are two ways to start one. No JAX.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

import ml_collections

from echo_jax.agent.collect import collect
from echo_jax.agent.protocol import Protocol
from echo_jax.run.inert import check_inert
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox import Sandbox
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.kvstore import MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Status, Task

if TYPE_CHECKING:
    from echo_jax.policy.vllm import VllmPolicy

_START_POLL_SECONDS = 1.0  # between two looks for what the learner writes before an engine starts
_WAITING_SECONDS = 60.0  # between two words to a person about such a wait
_REPORT_SECONDS = 5.0


class RolloutWorker:
    """Draws groups with an engine that follows the published weights."""

    def __init__(self, work: Workdir, policy: 'VllmPolicy', name: str):
        self.name, self._work, self._policy = name, work, policy
        config = work.config
        self._weights = WeightStore(work.url('weights'))
        self._due = DueStore(work.url('fleet'))
        self._protocol = Protocol(work.tokenizer(), config.protocol)
        run = hashlib.sha256(os.path.abspath(work.path).encode()).hexdigest()[:16]
        self._make_sandbox = sandbox_maker(config, run=run, worker=name)
        self._sandboxes = asyncio.Semaphore(config.sandbox.at_once)
        self._loading = asyncio.Lock()
        self._loaded: tuple[int, str] | None = None
        self._tasks: dict[str, dict[str, Task]] = {}
        self._counts = {'groups': 0, 'rollouts': 0, 'failed': 0, 'drawing': 0}

    async def refresh(self) -> None:
        """Takes the newest published weights, unless it has them."""
        async with self._loading:
            newest = await asyncio.to_thread(self._weights.newest)
            if newest is not None and newest != self._loaded:
                # A version that is missing by now was collected, because there is a newer one.
                with contextlib.suppress(MissingError):
                    await self._policy.load(newest[0])
                    self._loaded = newest

    async def draw(self, due: DueGroups, group_id: int) -> None:
        """Draws a group with the newest weights and writes it, unless it is there already."""
        await self.refresh()
        while self._policy.version < due.version:  # it was published a moment after the look
            await asyncio.sleep(self._work.poll_seconds)
            await self.refresh()
        self._counts['drawing'] += 1
        try:
            task, make_sandbox = self._find(due.split, dict(due.assignments)[group_id])
            await collect(
                [(group_id, task)],
                RolloutStore(self._work.url('rollouts', due.store)),
                config=self._work.config,
                make_sandbox=make_sandbox,
                protocol=self._protocol,
                policy_for=lambda task: self._policy,
                group_size=due.group_size,
                temperature=due.temperature,
                sandboxes=self._sandboxes,
                on_group=self._count,
            )
        finally:
            self._counts['drawing'] -= 1

    def _count(self, group: list[Rollout]) -> None:
        self._counts['groups'] += 1
        self._counts['rollouts'] += len(group)
        self._counts['failed'] += sum(r.status == Status.INFRA_ERROR for r in group)

    def _find(self, split: str, task_id: str) -> tuple[Task, Callable[[Task], Sandbox]]:
        """The task, and what makes its sandboxes.

        If this machine lacks the task (a file or a variable that only the learner has), none can
        be made: its rollouts are an INFRA_ERROR with the reason, and the worker goes on. A split is
        read when its first group is due: the learner has made the tasks by then.
        """
        if split not in self._tasks:
            self._tasks[split] = {task.task_id: task for task in self._work.tasks(split)}
        tasks = self._tasks[split]
        if task_id in tasks:
            return tasks[task_id], self._make_sandbox
        reasons = dict(self._work.read_tasks(split).left_out)
        reason = reasons.get(task_id, f'it is not among the {len(tasks)} tasks of {split} here')

        def refuse(task: Task) -> Sandbox:
            raise ValueError(
                f'{task.task_id} cannot be run by worker {self.name}: {reason}; give worker and '
                'learner the same tasks'
            )

        return Task(task_id, self._work.path, instruction=''), refuse

    async def report(self) -> None:
        """Writes every few seconds how the worker is, until it is cancelled."""
        while True:
            swap = self._policy.swap._asdict() if self._policy.swap else {}
            values = {'version': self._policy.version} | self._counts | swap
            await asyncio.to_thread(self._due.report, self.name, values)
            await asyncio.sleep(_REPORT_SECONDS)

    async def close(self) -> None:
        await self._policy.close()
        await asyncio.to_thread(self._make_sandbox.close)

    async def serve(self, index: int = 0, count: int = 1) -> None:
        """Draws the groups whose number is `index` modulo `count`, until the learner finishes."""
        async with asyncio.TaskGroup() as running:
            reporting = running.create_task(self.report())
            async for due, group_id in due_groups(self._work):
                if group_id % count == index:
                    running.create_task(self.draw(due, group_id))
            reporting.cancel()


async def due_groups(work: Workdir) -> AsyncIterator[tuple[DueGroups, int]]:
    """Every group that is due and not in its store, when it falls due, until the learner finishes.

    A group that falls due again, because the learner was started again, is given again.
    """
    store = DueStore(work.url('fleet'))
    given: set[tuple[str, int]] = set()
    while not await asyncio.to_thread(store.finished):
        listed = await asyncio.to_thread(store.listed)
        given &= {(due.store, group_id) for due in listed for group_id in due.group_ids}
        for due in listed:
            new = [i for i in due.group_ids if (due.store, i) not in given]
            given |= {(due.store, group_id) for group_id in new}
            rollouts = RolloutStore(work.url('rollouts', due.store))
            for group_id in await asyncio.to_thread(rollouts.missing, new):
                yield due, group_id
        await asyncio.sleep(work.poll_seconds)


async def start(
    config: ml_collections.ConfigDict, workdir: str, name: str, **engine
) -> RolloutWorker:
    """Starts a worker of the run in `workdir`, once the learner has said which model it is.

    engine: settings of this machine that replace the recipe's, such as gpu_memory_utilization.
    """
    from echo_jax.policy.vllm import VllmPolicy  # here: only workers have vLLM

    work = await open_run(config, workdir)
    await _until(lambda: work.served_model().exists(), 'the learner to write model/')
    weights = WeightStore(work.url('weights'))
    await _until(lambda: weights.latest() is not None, 'the learner to publish its weights')
    settings = engine_settings(config) | engine
    policy = await VllmPolicy.start(work.served_model(), work.url('weights'), **settings)
    return RolloutWorker(work, policy, name)


def engine_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a recipe says of an engine, as `VllmPolicy.start` takes it."""
    return {
        'dtype': config.model.dtype,
        'max_model_len': config.protocol.max_total_tokens,
        'max_num_seqs': config.policy.slots,
        'tensor_parallel_size': config.policy.tensor_parallel,
        'gpu_memory_utilization': config.policy.gpu_memory_utilization,
    }


async def open_run(config: ml_collections.ConfigDict, workdir: str) -> Workdir:
    """Opens the run in `workdir`, once the learner has made it."""
    await _until(lambda: Workdir.holds_run(workdir), f'the learner to start a run in {workdir}')
    return Workdir(workdir, config)


async def _until(condition: Callable[[], bool], what: str) -> None:
    """Waits until the condition holds, and says once in a while what it waits for."""
    said = time.monotonic() - _WAITING_SECONDS + 10  # most waits are shorter than ten seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() - said > _WAITING_SECONDS:
            logging.warning('waiting for %s', what)
            said = time.monotonic()
        await asyncio.sleep(_START_POLL_SECONDS)


def check_config(config: ml_collections.ConfigDict, overrides: Iterable[str]) -> None:
    """Raises ValueError if the run of this config has no workers, or a key that is set cannot act.

    overrides: the keys that flags name (`run.entry.overrides`).
    """
    if config.policy.backend != 'vllm':
        raise ValueError(
            f'policy.backend is {config.policy.backend!r}: its learner samples by itself; workers '
            "are for 'vllm'"
        )
    check_inert(config, overrides)
