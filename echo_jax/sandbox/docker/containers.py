"""Containers for `sandbox.py`: how one is hardened, begun and removed.

Its functions block, so `sandbox.py` calls them in threads. Knows nothing of shells and commands.
"""

import contextlib
import socket
from typing import NamedTuple

import docker

from echo_jax.sandbox import PATH, read_script
from echo_jax.sandbox.docker import engine
from echo_jax.sandbox.docker.images import HOME, Image
from echo_jax.types import Task

_GONE_SEC = 20  # for an engine that is removing a container already
_ENGINES_PIDS = 16  # what opening a shell needs while the agent has all of its own
_SHARED = ('/tmp', '/var/tmp')  # mode 1777


class Limits(NamedTuple):
    """What one container may use; see `DockerSandbox`."""

    memory_mb: int
    processes: int = 256
    disk_mb: int = 1024
    files: int = 65_536  # inodes of each directory in memory
    open_files: int = 1_024


def check_runtime(used: engine.Engine, runtime: str | None) -> None:
    """ValueError if the engine does not know `runtime`; None is its default."""
    known = sorted(used.info.get('Runtimes') or ())
    if runtime is not None and runtime not in known:
        raise ValueError(
            f'sandbox.runtime is {runtime!r}, which the Docker engine {used.url} does not know; '
            f'expected None or one of {", ".join(known)}, or name it in its daemon.json'
        )


def create(
    used: engine.Engine, task: Task, image: Image, name: str, limits: Limits, runtime: str | None
) -> socket.socket:
    """Starts the container `name` and returns the streams of its process 1.

    Raises SandboxError, or docker.errors.ImageNotFound if the engine has lost the image.
    """
    script = read_script('put') + read_script('docker_init')
    api = used.client.api
    api.create_container(
        image.name,
        entrypoint=[f'{HOME}/init', '--norc', '--noprofile', '-pc', script, 'init'],
        command=[PATH, f'{HOME}/seeds', *(image.writable if image.user else ())],
        name=name,
        hostname='sandbox',
        user=f'{image.user}:{image.user}',
        stdin_open=True,  # and closed for good when we are gone, since not detached
        environment=image.env,
        working_dir='/',
        labels=used.labels() | {'echo_jax.task': task.task_id},
        healthcheck={'test': ['NONE']},
        stop_signal='SIGKILL',  # process 1 heeds no other; a restarted engine would wait for it
        host_config=_host_config(used, task, image, limits, runtime),
    )
    try:
        streams = 'stdin=1&stdout=1&stderr=1&stream=1'
        stream = used.hijack(f'/containers/{name}/attach?{streams}')
        api.start(name)
        return stream
    except BaseException:
        with contextlib.suppress(*engine.FAILURES):
            remove(used, name)
        raise


def _host_config(
    used: engine.Engine, task: Task, image: Image, limits: Limits, runtime: str | None
) -> dict:
    user, disk = image.user, limits.disk_mb << 20
    memory = f'{limits.memory_mb + (limits.disk_mb if user else 0)}m'
    tmpfs = f'rw,exec,nosuid,nodev,size={disk},nr_inodes={limits.files},uid={user},gid={user}'
    return used.client.api.create_host_config(
        auto_remove=True,
        cap_drop=['ALL'],
        security_opt=['no-new-privileges'],
        network_mode='bridge' if task.network else 'none',
        pids_limit=limits.processes + _ENGINES_PIDS,
        mem_limit=memory,
        memswap_limit=memory,
        nano_cpus=int(min(task.cpus or 1.0, used.info['NCPU']) * 1e9),
        oom_score_adj=1000,  # the first that an out-of-memory kernel kills
        read_only=bool(user),
        tmpfs={
            path: f'{tmpfs},mode={1777 if path in _SHARED else 755}'
            for path in (image.writable if user else ())
        },
        shm_size=disk,
        ulimits=[
            docker.types.Ulimit(name='fsize', soft=disk, hard=disk),
            docker.types.Ulimit(name='nofile', soft=limits.open_files, hard=limits.open_files),
            docker.types.Ulimit(name='core', soft=0, hard=0),
        ],
        log_config={'type': 'none'},  # process 1 writes to us alone, not to the host's disk
        init=False,
        runtime=runtime,
    )


def written(used: engine.Engine, name: str) -> int:
    """Bytes in the container's own layer. docker.errors.NotFound if it does not run."""
    found = used.client.api.containers(filters={'name': f'^/{name}$'}, size=True)
    if not found:
        raise docker.errors.NotFound(f'no container {name}')
    return found[0].get('SizeRw', 0)


def remove(used: engine.Engine, name: str) -> None:
    """Removes the container with its own volumes; returns when it is gone, whoever removed it."""
    api = used.client.api
    with contextlib.suppress(docker.errors.NotFound):
        try:
            api.remove_container(name, force=True, v=True)
        except docker.errors.APIError as error:
            if error.status_code != 409:
                raise
            # The engine is removing it already.
            api.wait(name, timeout=_GONE_SEC, condition='removed')


def sweep(used: engine.Engine, own: bool = False) -> list[str]:
    """Removes what a dead predecessor of this run and worker left, and returns the names.

    Call it before the first sandbox. Images stay, and so do things of other runs and workers, and
    those of a process of this machine that is alive: two workers with one name harm no one. With
    `own`, call it after the last sandbox, to remove what this process could not remove because an
    engine died.
    """
    api, labels = used.client.api, used.labels()
    ours = {'label': [f'{key}={labels[key]}' for key in ('echo_jax.run', 'echo_jax.worker')]}

    def left(thing: dict) -> bool:
        if thing['Labels'].get('echo_jax.owner') == labels['echo_jax.owner']:
            return own
        host, _, rest = thing['Labels'].get('echo_jax.owner', '').partition(':')
        pid = int(rest.partition(':')[0] or 0)
        return host != socket.gethostname() or engine.owner(pid) != f'{host}:{rest}'

    containers = used.blocking(api.containers, all=True, filters=ours)
    volumes = used.blocking(api.volumes, filters=ours)['Volumes'] or []
    removed = []
    for name in (container['Id'] for container in containers if left(container)):
        used.blocking(remove, used, name)
        removed.append(name)
    for name in (volume['Name'] for volume in volumes if left(volume)):
        with contextlib.suppress(docker.errors.NotFound):
            used.blocking(api.remove_volume, name, force=True)
        removed.append(name)
    return removed
