"""Runs rollout workers on an existing Ray cluster: Ray places, restarts and scales them.

    python launch/ray/fleet.py --config=configs/qwen3_8b.py --workdir=RUN --workers=8

Run it from the checkout, in the environment of requirements-rollout.txt, on any machine of the
cluster (RAY_ADDRESS, or --address). Every worker is an actor with --gpus GPUs. Ray's autoscaler
sees the actors that have no place yet as demand. The learner posts which groups are due; this
program gives each to a worker that has room. When a worker dies, alone or with its machine, its
groups go to others and Ray starts it again. A group is written once, no matter how many workers
draw it, so this program may be killed and started again at any time. It ends when the learner has
finished. It starts neither a cluster nor a learner.
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
from echo_jax.run.rollout_worker import RolloutWorker, check_config, due_groups, open_run, start
from echo_jax.store.due import DueGroups

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, "Folder or gs:// URL of the run, the learner's.", required=True
)
_WORKERS = flags.DEFINE_integer('workers', 1, 'How many to keep up.', lower_bound=1)
_GPUS = flags.DEFINE_float('gpus', None, 'GPUs of a worker; if not given, policy.tensor_parallel.')
_ADDRESS = flags.DEFINE_string('address', 'auto', "The Ray cluster's; auto: of this machine.")
flags.mark_flag_as_required('config')

ROOT = pathlib.Path(__file__).parents[2]
_POLL_SECONDS = 0.2


class WorkerActor:
    """A RolloutWorker in one of Ray's processes. Call `start` before anything else."""

    def __init__(self, config: dict, workdir: str, name: str):
        self._settings = ml_collections.FrozenConfigDict(config), workdir, name
        self._worker: RolloutWorker | None = None

    async def start(self) -> None:
        if self._worker is None:  # Ray may call twice if the network fails
            self._worker = await start(*self._settings)
            self._reporting = asyncio.ensure_future(self._worker.report())

    async def draw(self, due: DueGroups, group_id: int) -> None:
        try:
            await self._started().draw(due, group_id)
        except PolicyError as error:  # the engine is lost; Ray makes another process
            logging.error('%s', error)
            os._exit(1)

    async def close(self) -> None:
        self._reporting.cancel()
        await self._started().close()

    def _started(self) -> RolloutWorker:
        if self._worker is None:
            raise RuntimeError('this actor has no worker yet; await its start() first')
        return self._worker


class Employee:
    """The actor of a worker. `life` counts how often it has died."""

    def __init__(self, actor):
        self.actor, self.life = actor, 0


class Fleet:
    """Gives groups to workers that have room."""

    def __init__(self, config: ml_collections.ConfigDict, running: asyncio.TaskGroup):
        self._running, self.employing = running, []
        # (employee, life), once for each group that the employee could begin.
        self._room: asyncio.Queue[tuple[Employee, int]] = asyncio.Queue()
        # Enough groups to fill all slots of an engine, and one to begin while another ends.
        self._groups_at_once = 1 + -(-config.policy.slots // config.group_size)

    async def employ(self, employee: Employee) -> None:
        """Waits until the worker is up, which may take a new machine, and offers its room."""
        while True:
            try:
                await employee.actor.start.remote()
                break
            except RayActorError:  # Ray is starting it again
                await asyncio.sleep(_POLL_SECONDS)
        for _ in range(self._groups_at_once):
            self._room.put_nowait((employee, employee.life))

    async def draw(self, due: DueGroups, group_id: int) -> None:
        """Has the group drawn; if a worker dies over it, by another."""
        while True:
            employee, life = await self._room.get()
            if life != employee.life:  # it offered this room before it died
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
    actor_class = ray.remote(
        max_restarts=-1, num_gpus=gpus, num_cpus=1, scheduling_strategy='SPREAD'
    )(WorkerActor)
    actors = [actor_class.remote(document, workdir, f'ray-{i}') for i in range(count)]
    async with asyncio.TaskGroup() as running:
        fleet = Fleet(config, running)
        tasks = [running.create_task(fleet.employ(Employee(actor))) for actor in actors]
        async for due, group_id in due_groups(work):
            tasks.append(running.create_task(fleet.draw(due, group_id)))
        for task in [*tasks, *fleet.employing]:  # some still wait for a worker without a place
            task.cancel()
    await asyncio.wait([asyncio.ensure_future(_close(actor)) for actor in actors], timeout=60)


async def _close(actor) -> None:
    with contextlib.suppress(RayActorError):
        await actor.close.remote()


def main(argv) -> None:
    del argv
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    check_config(config, entry.overrides())
    # Ray's nodes may have no checkout, so the code is sent with the job.
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
