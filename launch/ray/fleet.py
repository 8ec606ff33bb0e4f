"""Runs rollout workers on an existing Ray cluster: Ray places, restarts and scales them.

    python launch/ray/fleet.py --config=configs/qwen3_8b.py --workdir=RUN --workers=8

Run it from the checkout, in the environment of requirements-rollout.txt, on any machine of the
cluster (RAY_ADDRESS, or --address). Every worker is an actor with --gpus GPUs. Ray's autoscaler
sees the actors that have no place yet as demand. Workers claim the groups that are due by
themselves, here as elsewhere. When one dies, alone or with its machine, Ray starts it again, and
its groups go to others meanwhile. This program may be killed and started again at any time. It ends
when the learner has finished. It starts neither a cluster nor a learner.
"""

import asyncio
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
from echo_jax.run.rollout_worker import check_config, open_run, start
from echo_jax.store.due import DueStore

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
_END_SECONDS = 60.0  # for the workers to end after the learner


class WorkerActor:
    """A rollout worker in one of Ray's processes."""

    def __init__(self, config: dict, workdir: str, name: str):
        self._settings = ml_collections.FrozenConfigDict(config), workdir, name

    async def serve(self) -> None:
        """Draws groups until the learner has finished."""
        _, workdir, name = self._settings
        entry.label_logs(workdir, worker=name)
        try:
            worker = await start(*self._settings)
            try:
                await worker.serve()
            finally:
                await worker.close()
        except* PolicyError as errors:  # the engine is lost; Ray makes another process
            logging.error('%s', errors.exceptions[0])
            os._exit(1)


async def employ(actor, name: str) -> None:
    """Has a worker serve to the end, however often it dies; it may have to wait for a machine."""
    while True:
        serving = actor.serve.remote()
        try:
            await serving
            return
        except RayActorError as error:  # Ray is starting it again
            logging.warning('worker %s died: %s', name, error)
            await asyncio.sleep(_POLL_SECONDS)
        except asyncio.CancelledError:
            ray.cancel(serving)
            raise


async def run_fleet(
    config: ml_collections.ConfigDict, workdir: str, count: int, gpus: float
) -> None:
    work = await open_run(config, workdir)
    document = json.loads(config.to_json())
    actor_class = ray.remote(
        max_restarts=-1, num_gpus=gpus, num_cpus=1, scheduling_strategy='SPREAD'
    )(WorkerActor)
    names = [f'ray-{i}' for i in range(count)]
    actors = [actor_class.remote(document, workdir, name) for name in names]
    due = DueStore(work.url('fleet'))
    async with asyncio.TaskGroup() as running:
        serving = [running.create_task(employ(*each)) for each in zip(actors, names)]
        while not await asyncio.to_thread(due.finished):
            await asyncio.sleep(work.poll_seconds)
        await asyncio.wait(serving, timeout=_END_SECONDS)
        for task in serving:  # some still wait for a place
            task.cancel()


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
