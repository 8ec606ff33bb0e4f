"""Joins the processes of a learner that runs on several hosts, and lets the first one lead."""

import contextlib
import glob
import importlib.util
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Starts `jax.distributed` where this process is one of several; call it before any array.

    Hosts of a TPU pod, tasks of a Slurm job and pods of an indexed Kubernetes job find each other.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port), JAX_PROCESS_COUNT and JAX_PROCESS_ID in every
    process. Raises ValueError where some of the three are missing.
    """
    environment = os.environ
    if address := environment.get('JAX_COORDINATOR_ADDRESS'):
        try:
            count = int(environment['JAX_PROCESS_COUNT'])
            index = int(environment['JAX_PROCESS_ID'])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f'JAX_COORDINATOR_ADDRESS is {address}, but JAX_PROCESS_COUNT and JAX_PROCESS_ID '
                f'are not both numbers ({error}); set all three'
            ) from error
        jax.distributed.initialize(address, count, index)
    elif _several_slurm_tasks() or _indexed_job() or _tpu_host():
        jax.distributed.initialize()  # which asks the same environment for the rest


def leads() -> bool:
    """True in the one process that writes what is written once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leader_first(what: str) -> Iterator[None]:
    """The first process goes through the block, then all others do."""
    if not leads():
        multihost_utils.sync_global_devices(what)
    yield
    if leads():
        multihost_utils.sync_global_devices(what)


def leader_says(flag: bool) -> bool:
    """The first process's `flag`, in every process; all must call it."""
    return bool(multihost_utils.broadcast_one_to_all(np.array(flag)))


def _several_slurm_tasks() -> bool:
    return 'SLURM_PROCID' in os.environ and int(os.environ.get('SLURM_NTASKS', '1')) > 1


def _indexed_job() -> bool:
    return {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= os.environ.keys()


def _tpu_host() -> bool:
    """Of a pod or alone: the same call serves both."""
    chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
    wanted = jax.config.jax_platforms in (None, '', 'tpu', 'tpu,cpu')
    return bool(chips) and wanted and importlib.util.find_spec('libtpu') is not None
