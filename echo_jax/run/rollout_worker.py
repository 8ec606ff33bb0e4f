"""A rollout worker: an engine that follows the published weights and draws the groups that are due.

The program `echo_jax.worker` and the Ray fleet (launch/ray) are two ways to start one. No JAX.
"""

import asyncio
import collections
import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable, Iterable
from typing import IO, TYPE_CHECKING, Any

import ml_collections

from echo_jax.agent.collect import collect
from echo_jax.agent.protocol import Protocol
from echo_jax.policy import PolicyError, check_swap
from echo_jax.run import entry
from echo_jax.run.inert import check_inert
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox import Sandbox
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.claims import Claims, Group
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.kvstore import CorruptError, MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Status, Task

if TYPE_CHECKING:
    from echo_jax.policy.vllm import VllmPolicy

_START_POLL_SECONDS = 1.0  # between two looks for what the learner writes before an engine starts
_WAITING_SECONDS = 60.0  # between two words to a person about such a wait
_REPORT_SECONDS = 5.0
_CLAIM_SECONDS = 0.1  # between two claims
_LOOKS = 5  # at the claims of other workers, in the time of a lease
AVOIDED_SECONDS = 30.0  # after an error, before a group is tried again
STORE_SECONDS = 5.0  # after an error of a store, before it is asked again
_STORE_ERRORS = OSError, ValueError  # as of a full disk; TensorStore raises the second for most
_COSTS = ('read_seconds', 'drain_seconds', 'load_seconds', 'probe_seconds')  # of a swap


class RolloutWorker:
    """Draws groups with an engine that follows the published weights."""

    def __init__(self, work: Workdir, policy: 'VllmPolicy', name: str, lock: IO | None = None):
        """name: of this worker alone, as long as `lock` is open."""
        self.name, self._work, self._policy, self._lock = name, work, policy, lock
        config = work.config
        self._weights = WeightStore(work.url('weights'))
        self._due = DueStore(work.url('fleet'))
        self._protocol = Protocol(work.tokenizer(), config.protocol)
        run = hashlib.sha256(os.path.abspath(work.path).encode()).hexdigest()[:16]
        self._make_sandbox = sandbox_maker(config, run=run, worker=name)
        self._sandboxes = asyncio.Semaphore(config.sandbox.at_once)
        self._loading = asyncio.Lock()
        self._loaded: tuple[int, str] | None = None
        self._damaged = ''  # the attempt at a version that could not be read, which is tried again
        self._read_again = 0.0  # at this time.monotonic(): the fault may be this machine's
        self._tasks: dict[str, dict[str, Task]] = {}
        self._claims = Claims(self._due.url, name, config.policy.lease_sec)
        # The episodes that keep engine and sandboxes busy, and how many run or wait to begin.
        self._episodes, self._running = min(config.policy.slots, config.sandbox.at_once), 0
        self._looked = 0.0  # at the claims of others, by time.monotonic()
        self._avoided: dict[Group, float] = {}  # until when this worker leaves a group to others
        # Since the start; docs/metrics.md#workers-reports has the names.
        counted = ('groups', 'rollouts', 'failed', *(f'status/{status}' for status in Status))
        self._counts = collections.Counter(dict.fromkeys(counted, 0))
        self._swaps = dict.fromkeys(('swaps', *(f'total_{cost}' for cost in _COSTS)), 0.0)

    async def refresh(self) -> None:
        """Takes the newest published weights, unless it has them.

        A swap goes on to its end even if the call is cancelled: the other groups need it.
        """
        await asyncio.shield(self._take_newest())

    async def _take_newest(self) -> None:
        async with self._loading:
            newest = await asyncio.to_thread(self._weights.newest)
            if newest is None or newest == self._loaded:
                return
            if newest[1] == self._damaged and time.monotonic() < self._read_again:
                return
            try:
                await self._policy.load(newest[0])
                self._loaded, self._damaged = newest, ''
                self._swaps['swaps'] += 1
                for cost in _COSTS:
                    self._swaps[f'total_{cost}'] += getattr(self._policy.swap, cost)
            except MissingError:
                pass  # a version that is missing by now was collected, because there is a newer one
            except CorruptError as error:
                logging.error('%s; the learner is asked for it again', error)
                self._damaged, self._read_again = newest[1], time.monotonic() + AVOIDED_SECONDS

    async def serve(self) -> None:
        """Draws the groups that are due and that no other worker draws, until the learner finishes.

        It claims a group when another episode could run. Between two claims it waits a moment, so
        that idle workers share what falls due together. A group that it has lost (another worker
        has taken it over, or the learner wants it no longer) is given up. While a store fails, as
        on a full disk, it goes on with what it draws, and asks again every few seconds.
        """
        async with asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(self.report())
            following = tasks.create_task(self.follow())
            drawing: dict[Group, asyncio.Task[None]] = {}
            while True:
                pause, claimed = self._work.poll_seconds, None
                try:
                    if await asyncio.to_thread(self._due.finished):
                        break
                    for group in await asyncio.to_thread(self._claims.renew):
                        if group in drawing:
                            drawing[group].cancel()
                    claimed = await asyncio.to_thread(self._claim)
                except _STORE_ERRORS as error:
                    self._complain(error)
                    pause = STORE_SECONDS
                if claimed:
                    due, group = claimed
                    self._running += due.group_size
                    drawing[group] = tasks.create_task(self._draw(due, group))
                    pause = min(pause, _CLAIM_SECONDS)
                drawing = {group: task for group, task in drawing.items() if not task.done()}
                for group in [g for g, until in self._avoided.items() if until < time.monotonic()]:
                    del self._avoided[group]
                await asyncio.sleep(pause)
            for task in [*drawing.values(), reporting, following]:
                task.cancel()
            async with self._loading:  # a swap that was begun ends before the engine does
                pass

    def _complain(self, error: Exception) -> None:
        logging.error('a store fails and is asked again in a while: %s', _words(error))

    def _claim(self) -> tuple[DueGroups, Group] | None:
        """Claims the oldest group that is due and that nobody draws, if there is room for one.

        The claims of others are looked at a few times in a lease, which is often enough to see that
        one runs out. A group whose weights are not out yet is left alone: if the learner is killed
        before they are, it goes on at an earlier version and has other work, for which there would
        be no room.
        """
        if self._running >= self._episodes:
            return None
        now, claimed = time.monotonic(), []
        newest = self._weights.latest()
        for due in sorted(self._due.listed(), key=lambda due: due.version):
            if newest is None or due.version > newest:
                break
            rollouts = RolloutStore(self._work.url('rollouts', due.store))
            missing = [i for i in due.group_ids if (due.store, i) not in self._avoided]
            missing = rollouts.missing(missing)
            free = self._claims.free(due.store, missing)
            for group_id in free:
                if self._take(due, group_id):
                    return due, (due.store, group_id)
            claimed += [(due, i) for i in missing if i not in free]
        if now - self._looked > self._work.config.policy.lease_sec / _LOOKS:
            for due, group_id in claimed:
                group = due.store, group_id
                if group not in self._claims.held and self._take(due, group_id):
                    return due, group
            self._claims.forget({(due.store, group_id) for due, group_id in claimed})
            self._looked = now
        return None

    def _take(self, due: DueGroups, group_id: int) -> bool:
        """Claims a group, with the version that the engine has at this moment."""
        return self._claims.take((due.store, group_id), max(self._policy.version, due.version))

    async def _draw(self, due: DueGroups, group: Group) -> None:
        """Draws a group that is claimed, and gives up the claim.

        An error that is not the engine's is logged, and the group left to others for a while.
        """
        ended = 0

        def on_rollout(rollout: Rollout) -> None:
            nonlocal ended
            ended += 1
            self._running -= 1
            self._count(rollout)

        try:
            await self.draw(due, group[1], on_rollout)
            self._counts['groups'] += 1
        except* PolicyError:
            raise
        except* Exception as errors:
            reason = _words(errors.exceptions[0])
            logging.error(
                'group %d of %s is tried again in a while: %s', group[1], group[0], reason
            )
            self._avoided[group] = time.monotonic() + AVOIDED_SECONDS
        finally:
            self._running -= due.group_size - ended
            try:
                await asyncio.to_thread(self._claims.release, group)
            except _STORE_ERRORS as error:  # the claim goes when its lease has run out
                self._complain(error)

    def _count(self, rollout: Rollout) -> None:
        errors = [name for name in rollout.metrics if name.startswith('error/')]
        failed = ['failed'] if rollout.status == Status.INFRA_ERROR else []
        self._counts.update(['rollouts', f'status/{rollout.status}', *failed, *errors])

    async def draw(
        self, due: DueGroups, group_id: int, on_rollout: Callable[[Rollout], None]
    ) -> None:
        """Draws a group with the newest weights and writes it, unless it is there already."""
        await self.refresh()
        while self._policy.version < due.version:  # what is out may be damaged, and comes again
            await asyncio.sleep(self._work.poll_seconds)
            await self.refresh()
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
            on_rollout=on_rollout,
        )

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
        """Writes every few seconds how the worker is, until it is cancelled, and once more then."""
        try:
            while True:
                with contextlib.suppress(*_STORE_ERRORS):  # `serve` says so
                    await asyncio.to_thread(self._due.report, self.name, self._state())
                await asyncio.sleep(_REPORT_SECONDS)
        finally:
            with contextlib.suppress(*_STORE_ERRORS):
                self._due.report(self.name, self._state())

    def _state(self) -> dict[str, Any]:
        drawing = {'drawing': len(self._claims.held), 'episodes': self._running}
        values = {'version': self._policy.version, 'damaged': self._damaged}
        values |= {**self._counts, **drawing}
        values |= self._policy.meter.read() | self._swaps
        return values | (self._policy.swap._asdict() if self._policy.swap else {})

    async def follow(self) -> None:
        """Takes new weights while groups are drawn, if the swap does not wait for their turns."""
        while self._work.config.policy.swap != 'drain':
            try:
                await self.refresh()
            except PolicyError:
                raise
            except Exception as error:  # of the store; the groups of that version wait
                logging.error('the newest weights are tried again in a while: %s', _words(error))
                await asyncio.sleep(AVOIDED_SECONDS)
            await asyncio.sleep(self._work.poll_seconds)

    async def close(self) -> None:
        await self._policy.close()
        await asyncio.to_thread(self._make_sandbox.close)
        if self._lock:
            self._lock.close()


def _words(error: Exception) -> str:
    return entry.of_disk(error) or repr(error)


async def start(
    config: ml_collections.ConfigDict, workdir: str, name: str = '', **engine
) -> RolloutWorker:
    """Starts a worker of the run in `workdir`, once the learner has said which model it is.

    name: of this worker alone; empty: its host, and the first number that is free there.
    engine: settings of this machine that replace the recipe's, such as gpu_memory_utilization.
    """
    if config.model.path and not pathlib.Path(config.model.path).is_dir():
        raise ValueError(
            f'model.path={config.model.path} is not on this machine; copy it here from the '
            "learner's, at least its config.json and tokenizer"
        )
    from echo_jax.policy.vllm import VllmPolicy  # here: only workers have vLLM

    work = await open_run(config, workdir)
    name, lock = _take_name(work, name)
    entry.label_logs(workdir, worker=name)
    # vLLM's loggers have a handler of their own, in its engine's processes too.
    prefix = entry.log_label().replace('%', '%%')  # it becomes part of a format
    os.environ.setdefault('VLLM_LOGGING_PREFIX', f'{prefix} ')
    await _until(lambda: work.served_model().exists(), 'the learner to write model/')
    weights = WeightStore(work.url('weights'))
    await _until(lambda: weights.latest() is not None, 'the learner to publish its weights')
    settings = engine_settings(config) | engine
    policy = await VllmPolicy.start(work.served_model(), work.url('weights'), **settings)
    return RolloutWorker(work, policy, name, lock)


def _take_name(work: Workdir, name: str) -> tuple[str, IO]:
    """A name that no other process of this machine has in this run, and the file that locks it.

    A worker that is started again gets the name of the one that died, and with it the claims and
    the containers that are labelled so. Raises ValueError if `name` is taken, or is no name.
    """
    if name and not re.fullmatch(r'\w[\w.-]*', name):
        raise ValueError(f'--name={name}; expected letters, digits, dots, hyphens and underscores')
    folder = work.path / 'workers'
    folder.mkdir(exist_ok=True)
    host = socket.gethostname()
    for each in [name] if name else (f'{host}-{i}' for i in itertools.count()):
        lock = (folder / f'{each}.lock').open('w')
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return each, lock
        except BlockingIOError:
            lock.close()
    raise ValueError(f'a worker named {name} draws for this run already; give another --name')


def engine_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a recipe says of an engine, as `VllmPolicy.start` takes it."""
    return {
        'dtype': config.model.dtype,
        'max_model_len': config.protocol.max_total_tokens,
        'max_num_seqs': config.policy.slots,
        'swap': config.policy.swap,
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
    check_swap(config.policy.swap)
    check_inert(config, overrides)
