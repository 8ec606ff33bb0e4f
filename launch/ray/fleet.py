"""Rollout workers on a Ray cluster that is there: Ray places, restarts and scales them.

    python launch/ray/fleet.py --config=configs/qwen3_8b.py --workdir=RUN --workers=8

Run it from the checkout, in the environment of requirements-rollout.txt, on any machine of the
cluster (RAY_ADDRESS, or --address). Every worker is an actor with --gpus GPUs; the ones that have
no place yet are what Ray's autoscaler sees as demand. The learner posts which groups are due; this
program gives each to a worker that has room. When a worker dies, with its machine or alone, its
groups go to others and Ray starts it again. Groups are written once, whoever draws them, so this
program may be killed and started again at any time, too. It ends when the learner has finished.
"""

import asyncio
import contextlib
import json
import logging
import os
import pathlib
import sys

import ml_collections
import ray
from absl import flags
from ml_collections import config_flags
from ray.exceptions import RayActorError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from echo_jax.policy import PolicyError
from echo_jax.run import entry
from echo_jax.run.rollout_worker import check_config, due_groups, open_run, start
from echo_jax.store.due import DueGroups

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string('workdir', None, "Folder or gs:// URL of the run, the learner's.")
_WORKERS = flags.DEFINE_integer('workers', 1, 'How many to keep up.', lower_bound=1)
_GPUS = flags.DEFINE_float('gpus', None, 'Of a worker; its policy.tensor_parallel if not given.')
_ADDRESS = flags.DEFINE_string('address', 'auto', "The Ray cluster's; auto: of this machine.")
flags.mark_flags_as_required(['config', 'workdir'])

ROOT = pathlib.Path(__file__).parents[2]
_POLL_SECONDS = 0.2


@ray.remote(max_restarts=-1)
class WorkerActor:
    """A RolloutWorker in a process of Ray's, started by its first call."""

    def __init__(self, config: dict, workdir: str, name: str):
        self._settings = ml_collections.FrozenConfigDict(config), workdir, name
        self._worker = None

    async def start(self) -> None:
        if self._worker is None:  # it may be asked twice where the network fails
            self._worker = await start(*self._settings)
            self._reporting = asyncio.ensure_future(self._worker.report())

    async def draw(self, due: DueGroups, group_id: int) -> None:
        try:
            await self._worker.draw(due, group_id)
        except PolicyError as error:  # this engine is lost; Ray makes another process
            logging.error('%s', error)
            os._exit(1)

    async def close(self) -> None:
        self._reporting.cancel()
        await self._worker.close()


class Employee:
    """A worker's actor; `life` counts how often it was started."""

    def __init__(self, actor):
        self.actor, self.life = actor, 0


class Fleet:
    """Gives groups to workers that have room."""

    def __init__(self, config: ml_collections.ConfigDict, running: asyncio.TaskGroup):
        self._running, self.employing = running, []
        self._room = asyncio.Queue()  # (employee, life), once for each group that it could begin
        # Enough for all slots of an engine, and one more to begin while another ends.
        self._groups_at_once = 1 + -(-config.policy.slots // config.group_size)

    async def employ(self, employee: Employee) -> None:
        """Waits until the worker is up, which may need a machine first, and offers its room."""
        while True:
            try:
                await employee.actor.start.remote()
                break
            except RayActorError:  # Ray is starting it again
                await asyncio.sleep(_POLL_SECONDS)
        for _ in range(self._groups_at_once):
            self._room.put_nowait((employee, employee.life))

    async def draw(self, due: DueGroups, group_id: int) -> None:
        """Has the group drawn; by another worker, where one dies."""
        while True:
            employee, life = await self._room.get()
            if life != employee.life:  # room of before it died
                continue
            try:
                await employee.actor.draw.remote(due, group_id)
            except RayActorError as error:
                logging.warning('group %d of %s: a worker died: %s', group_id, due.store, error)
                if life == employee.life:  # the first of its groups to notice
                    employee.life += 1
                    self.employing.append(self._running.create_task(self.employ(employee)))
                continue
            self._room.put_nowait((employee, life))
            return


async def run_fleet(
    config: ml_collections.ConfigDict, workdir: str, count: int, gpus: float
) -> None:
    work = await open_run(config, workdir)
    document = json.loads(config.to_json())
    actors = [
        WorkerActor.options(num_gpus=gpus, num_cpus=1, scheduling_strategy='SPREAD').remote(
            document, workdir, f'ray-{i}'
        )
        for i in range(count)
    ]
    async with asyncio.TaskGroup() as running:
        fleet = Fleet(config, running)
        tasks = [running.create_task(fleet.employ(Employee(actor))) for actor in actors]
        async for due, group_id in due_groups(work):
            tasks.append(running.create_task(fleet.draw(due, group_id)))
        for task in [*tasks, *fleet.employing]:  # of workers that found no place, among others
            task.cancel()
    await asyncio.wait([asyncio.ensure_future(_close(actor)) for actor in actors], timeout=60)


async def _close(actor) -> None:
    with contextlib.suppress(RayActorError):
        await actor.close.remote()


def main(argv) -> None:
    del argv
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    check_config(config)
    # Ray's nodes may have no checkout: the code goes with the job.
    code = {
        'working_dir': str(ROOT),
        'excludes': ['.git', '.venv*', 'runs', 'experiments', 'tests'],
    }
    ray.init(_ADDRESS.value, runtime_env=code, log_to_driver=True)
    gpus = config.policy.tensor_parallel if _GPUS.value is None else _GPUS.value
    work = run_fleet(config, _WORKDIR.value, _WORKERS.value, gpus)
    try:
        entry.Stop().run(work)
    except entry.Stopped:
        sys.exit('stopped, and the workers with it; the same command goes on from here')


if __name__ == '__main__':
    entry.run(main, ConnectionError)
