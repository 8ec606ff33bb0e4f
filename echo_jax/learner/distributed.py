"""Joins the processes of a learner that runs on several hosts, and lets the first one lead."""

import contextlib
import glob
import importlib.util
import json
import os
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Starts `jax.distributed` if this process is one of several. Call it before making any array.

    Hosts of a TPU pod, tasks of a Slurm job and pods of an indexed Kubernetes job find each other.
    Elsewhere set JAX_COORDINATOR_ADDRESS (host:port), JAX_PROCESS_COUNT and JAX_PROCESS_ID in every
    process. Raises ValueError if the first is set and the other two are not both numbers.
    """
    environment = os.environ
    address = environment.get('JAX_COORDINATOR_ADDRESS')
    if address:
        try:
            count = int(environment['JAX_PROCESS_COUNT'])
            index = int(environment['JAX_PROCESS_ID'])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f'JAX_COORDINATOR_ADDRESS is {address}, but JAX_PROCESS_COUNT and JAX_PROCESS_ID '
                f'are not both numbers ({error}); set all three'
            ) from error
        jax.distributed.initialize(address, count, index)
        return
    slurm = 'SLURM_PROCID' in environment and int(environment.get('SLURM_NTASKS', '1')) > 1
    kubernetes = {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= environment.keys()
    if slurm or kubernetes or _tpu_host():
        jax.distributed.initialize()  # JAX reads the rest from the same environment


def leads() -> bool:
    """Whether this process is the first one, which alone writes what all of them share."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leader_first(what: str) -> Generator[None]:
    """Lets the first process go through the block, and then all others; all must call it.

    `what` is the name under which they wait for each other.
    """
    if not leads():
        multihost_utils.sync_global_devices(what)
    yield
    if leads():
        multihost_utils.sync_global_devices(what)


def leader_says(value: Any) -> Any:
    """Returns the first process's `value`, which JSON can hold, in every process; all call it."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.array(len(data))))
    padded = np.zeros(size, np.uint8)
    padded[: min(size, len(data))] = data[:size]
    return json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())


def _tpu_host() -> bool:
    """Whether this machine has TPUs to be used. It may be one of a pod, or alone."""
    chips = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
    wanted = jax.config.values['jax_platforms'] in (None, '', 'tpu', 'tpu,cpu')
    return bool(chips) and wanted and importlib.util.find_spec('libtpu') is not None
