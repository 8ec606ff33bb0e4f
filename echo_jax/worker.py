"""One rollout worker's program: groups that are due in, groups of rollouts in the store.

    python -m echo_jax.worker --config=configs/qwen3_8b.py --workdir=RUN

It runs beside the learner or on machines of its own, without JAX: vLLM samples with the weights
that the learner publishes, commands run in sandboxes. Several share the work by --index and
--count; on a Ray cluster launch/ray starts them instead. A group is written when all its rollouts
are there; one that the store has already is not drawn again, so a killed worker's successor goes
on. The learner with the embedded policy uses `collect` in its own process.
"""

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import NamedTuple

import ml_collections
from absl import flags
from ml_collections import config_flags

from echo_jax import program
from echo_jax.agent.episode import run_group
from echo_jax.agent.policy import Policy, PolicyError
from echo_jax.agent.protocol import Protocol
from echo_jax.agent.sandbox import Sandbox, local
from echo_jax.store.kvstore import MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.rounds import Round, RoundStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Status, Task
from echo_jax.workdir import Workdir

_POLL_SECONDS = 1.0  # of what an engine's start waits for
_REPORT_SECONDS = 5.0

Assignments = Iterable[tuple[int, Task]]  # a group's id and its task


class SandboxMaker(NamedTuple):
    """Makes the sandbox of a task; `close` it when the last one has stopped."""

    make: Callable[[Task], Sandbox]
    close: Callable[[], object] = lambda: None

    def __call__(self, task: Task) -> Sandbox:
        return self.make(task)


def sandbox_maker(
    config: ml_collections.ConfigDict, backend: str = '', *, run: str = '', worker: str = ''
) -> SandboxMaker:
    """By `sandbox.backend`, or by `backend`; fails early where this machine allows no sandbox.

    `run` and `worker` label what a Docker engine keeps for it; what a dead process of the same
    labels left there is removed.
    """
    limits = {key: config.sandbox[key] for key in ('processes', 'memory_mb', 'disk_mb')}
    match backend or config.sandbox.backend:
        case 'local':
            local.check()
            return SandboxMaker(functools.partial(local.LocalSandbox, **limits))
        case 'docker':
            images = docker_images(config, run, worker)
            from echo_jax.agent.sandbox import containers, docker

            containers.sweep(images.engine)

            def close():
                images.close()
                containers.sweep(images.engine, own=True)
                images.engine.close()

            return SandboxMaker(
                functools.partial(docker.DockerSandbox, images=images, **limits), close
            )
        case 'harbor':
            from echo_jax.agent.sandbox import harbor

            harbor.check(config.sandbox.harbor_environment)
            del limits['processes']
            environment = config.sandbox.harbor_environment
            return SandboxMaker(
                functools.partial(harbor.HarborSandbox, environment=environment, **limits)
            )
        case backend:
            raise ValueError(
                f"sandbox.backend is {backend!r}; expected 'local', 'docker' or 'harbor'"
            )


def docker_images(config: ml_collections.ConfigDict, run: str = '', worker: str = ''):
    """The images.Images of the engine at DOCKER_HOST; fails where it or the Docker SDK is not."""
    try:  # here: no other backend needs the SDK
        from echo_jax.agent.sandbox import engine, images
    except ModuleNotFoundError as error:
        raise ValueError(
            f"sandbox.backend='docker' needs the Docker SDK ({error}); pip install docker"
        ) from error
    return images.Images(
        engine.Engine(run=run, worker=worker),
        user=config.sandbox.user,
        network=config.sandbox.build_network,
        seed=config.seed,
    )


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


# -------------------------------------------------------------------------------------- the program


class Worker:
    """An engine that follows the published weights, and the episodes that it samples for."""

    def __init__(self, work: Workdir, policy, name: str):
        """policy: policy/vllm.py's, with `load`, `version` and `swap` besides `generate`."""
        self.name, self._work, self._policy = name, work, policy
        config = work.config
        self._weights = WeightStore(work.url('weights'))
        self._rounds = RoundStore(work.url('fleet'))
        self._protocol = Protocol(work.tokenizer(), config.protocol)
        run = hashlib.sha256(os.path.abspath(work.path).encode()).hexdigest()[:16]
        self._make_sandbox = sandbox_maker(config, run=run, worker=name)
        self._sandboxes = asyncio.Semaphore(config.sandbox.at_once)
        self._loading, self._loaded = asyncio.Lock(), None
        self._tasks: dict[str, dict[str, Task]] = {}
        self._counts = {'groups': 0, 'rollouts': 0, 'failed': 0, 'drawing': 0}

    async def refresh(self) -> None:
        """Takes the newest published weights, unless it has them."""
        async with self._loading:
            newest = await asyncio.to_thread(self._weights.newest)
            if newest is not None and newest != self._loaded:
                with contextlib.suppress(MissingError):  # collected by now: there is a newer one
                    await self._policy.load(newest[0])
                    self._loaded = newest

    async def draw(self, round_: Round, group_id: int) -> None:
        """Draws a group with the newest weights and writes it, unless it is there already."""
        await self.refresh()
        while self._policy.version < round_.version:  # missed it by a moment
            await asyncio.sleep(self._work.poll_seconds)
            await self.refresh()
        self._counts['drawing'] += 1
        try:
            await collect(
                [(group_id, self._task(round_.split, dict(round_.assignments)[group_id]))],
                RolloutStore(self._work.url('rollouts', round_.store)),
                config=self._work.config,
                make_sandbox=self._make_sandbox,
                protocol=self._protocol,
                policy=self._policy,
                group_size=round_.group_size,
                temperature=round_.temperature,
                sandboxes=self._sandboxes,
                on_group=self._count,
            )
        finally:
            self._counts['drawing'] -= 1

    def _count(self, group: list[Rollout]) -> None:
        self._counts['groups'] += 1
        self._counts['rollouts'] += len(group)
        self._counts['failed'] += sum(r.status == Status.INFRA_ERROR for r in group)

    def _task(self, split: str, task_id: str) -> Task:
        """Read at the first round of its split: the learner has made the tasks by then."""
        if split not in self._tasks:
            self._tasks[split] = {task.task_id: task for task in self._work.tasks(split)}
        if task_id not in self._tasks[split]:
            raise ValueError(
                f'there is no task {task_id} among the {len(self._tasks[split])} of {split} here; '
                'give worker and learner the same tasks'
            )
        return self._tasks[split][task_id]

    async def report(self) -> None:
        """Says how it is, again and again."""
        while True:
            swap = self._policy.swap._asdict() if self._policy.swap else {}
            values = {'version': self._policy.version} | self._counts | swap
            await asyncio.to_thread(self._rounds.report, self.name, values)
            await asyncio.sleep(_REPORT_SECONDS)

    async def close(self) -> None:
        await self._policy.close()
        await asyncio.to_thread(self._make_sandbox.close)

    async def serve(self, index: int = 0, count: int = 1) -> None:
        """Draws the groups of numbers `index` modulo `count`, until the learner has finished."""
        async with asyncio.TaskGroup() as running:
            reporting = running.create_task(self.report())
            async for round_, group_id in due_groups(self._work):
                if group_id % count == index:
                    running.create_task(self.draw(round_, group_id))
            reporting.cancel()


async def due_groups(work: Workdir) -> AsyncIterator[tuple[Round, int]]:
    """The groups that are due and not there, each as it falls due, until the learner has finished.

    One that falls due again, since a learner started anew, comes again.
    """
    rounds, given = RoundStore(work.url('fleet')), set()
    while not await asyncio.to_thread(rounds.finished):
        due = await asyncio.to_thread(rounds.due)
        given &= {(round_.store, group_id) for round_ in due for group_id in round_.group_ids}
        for round_ in due:
            new = [i for i in round_.group_ids if (round_.store, i) not in given]
            given |= {(round_.store, group_id) for group_id in new}
            store = RolloutStore(work.url('rollouts', round_.store))
            for group_id in await asyncio.to_thread(store.missing, new):
                yield round_, group_id
        await asyncio.sleep(work.poll_seconds)


async def start(config: ml_collections.ConfigDict, workdir: str, name: str, **engine) -> Worker:
    """A worker of the run in `workdir`, once the learner has said which model it is.

    engine: settings of this machine in place of the recipe's, such as gpu_memory_utilization.
    """
    from echo_jax.agent.policy.vllm import VllmPolicy  # here: only workers have vLLM

    work = await open_run(config, workdir)
    await _until(lambda: work.served_model().exists(), 'the learner to write model/')
    weights = WeightStore(work.url('weights'))
    await _until(lambda: weights.latest() is not None, 'the learner to publish its weights')
    settings = {
        'dtype': config.model.dtype,
        'max_model_len': config.protocol.max_total_tokens,
        'max_num_seqs': config.policy.slots,
        'tensor_parallel_size': config.policy.tensor_parallel,
        'gpu_memory_utilization': config.policy.gpu_memory_utilization,
    }
    policy = await VllmPolicy.start(work.served_model(), work.url('weights'), **settings | engine)
    return Worker(work, policy, name)


async def open_run(config: ml_collections.ConfigDict, workdir: str) -> Workdir:
    """The run in `workdir`, once the learner has made it."""
    await _until(lambda: Workdir.holds_run(workdir), f'the learner to start a run in {workdir}')
    return Workdir(workdir, config)


async def _until(condition: Callable[[], object], what: str):
    """The first true value of `condition()`; says once in a while that it waits."""
    said = time.monotonic() - 50
    while not (value := await asyncio.to_thread(condition)):
        if time.monotonic() - said > 60:
            logging.warning('waiting for %s', what)
            said = time.monotonic()
        await asyncio.sleep(_POLL_SECONDS)
    return value


def check_config(config: ml_collections.ConfigDict) -> None:
    if config.policy.backend != 'vllm':
        raise ValueError(
            f'policy.backend is {config.policy.backend!r}: its learner samples by itself; workers '
            "are for 'vllm'"
        )


def main(argv: Sequence[str]) -> None:
    del argv
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    if not 0 <= _INDEX.value < _COUNT.value:
        raise ValueError(f'--index={_INDEX.value} is not below --count={_COUNT.value}')
    check_config(config)
    name = _NAME.value or f'{socket.gethostname()}-{_INDEX.value}'
    here = {'gpu_memory_utilization': _MEMORY.value, 'tensor_parallel_size': _PARALLEL.value}
    engine = {key: value for key, value in here.items() if value is not None}

    async def work():
        worker = await start(config, _WORKDIR.value, name, **engine)
        try:
            await worker.serve(_INDEX.value, _COUNT.value)
        finally:
            await worker.close()

    sandbox_maker(config).close()  # fails now where this machine allows no sandbox
    try:
        program.Stop().run(work())
    except program.Stopped:
        sys.exit('stopped; the same command goes on from here')


if __name__ == '__main__':
    _CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
    _WORKDIR = flags.DEFINE_string(
        'workdir', None, "Folder or gs:// URL of the run, the learner's."
    )
    _INDEX = flags.DEFINE_integer('index', 0, 'Which of the workers this is, from 0.')
    _COUNT = flags.DEFINE_integer('count', 1, 'Workers that share the work.')
    _NAME = flags.DEFINE_string('name', '', 'Of this worker; empty: its host and index.')
    _MEMORY = flags.DEFINE_float(
        'gpu_memory_utilization', None, "Share of a GPU's memory, in place of the recipe's."
    )
    _PARALLEL = flags.DEFINE_integer(
        'tensor_parallel', None, "GPUs of the engine, in place of the recipe's."
    )
    flags.mark_flags_as_required(['config', 'workdir'])
    program.run(main, PolicyError)
