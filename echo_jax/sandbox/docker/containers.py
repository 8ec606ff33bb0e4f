"""Containers for `docker.py`: how one is hardened, begun and removed, and what process 1 does.

Blocks: `docker.py` calls it in threads. Knows nothing of shells and commands.
"""

import contextlib
import socket
import time
from typing import NamedTuple

import docker

from echo_jax.sandbox import channels
from echo_jax.sandbox.docker import engine
from echo_jax.sandbox.docker.images import HOME, Image
from echo_jax.sandbox.local import namespaces
from echo_jax.types import Task

_GONE_SEC = 20.0  # for an engine that is removing a container already
_ENGINES_PIDS = 16  # what opening a shell needs while the agent has all of its own
_SHARED = ('/tmp', '/var/tmp')  # mode 1777

# The pipe 7 is there to wait on: a sleep without a process.
_PROCESS_1 = r"""
PATH=SYSTEM_PATH
umask 022
exec 7<> <(:)
for d; do
  [[ ! -d HOME/seeds$d ]] || problem=$(cp -a "HOME/seeds$d/." "$d/" 2>&1) || {
    echo "the image's $d does not fit in disk_mb ($?; ${problem//$'\n'/; })"; exit 1
  }
done
exec 2>/dev/null
place() { :; }
echo ready
while IFS=' ' read -r request size escaped; do
  printf -v path %b "$escaped"
  case $request in
    kill) while kill -9 -1; do read -r -t .001 -u 7; done; echo done ;;
TRANSFERS
  esac
done
"""
_PROCESS_1 = (
    _PROCESS_1.replace('HOME', HOME)
    .replace('SYSTEM_PATH', namespaces.PATH)
    .replace('TRANSFERS', channels.TRANSFERS)
)


class Limits(NamedTuple):
    """What one container may use; see `docker.DockerSandbox`."""

    processes: int
    memory_mb: int
    disk_mb: int
    files: int  # inodes of each directory in memory
    open_files: int


def create(
    used: engine.Engine, task: Task, image: Image, name: str, limits: Limits, runtime: str | None
) -> socket.socket:
    """Starts the container `name`; the streams of its process 1.

    Raises SandboxError, docker.errors.ImageNotFound where the engine has lost the image.
    """
    api = used.client.api
    api.create_container(
        image.name,
        entrypoint=[f'{HOME}/init', '--norc', '--noprofile', '-pc', _PROCESS_1, 'init'],
        command=list(image.writable if image.user else ()),
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
        attached = {'stdin': 1, 'stdout': 1, 'stderr': 1, 'stream': 1}
        stream = used.stream(api.attach_socket(name, attached))
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
        network_mode='bridge' if task.allow_internet else 'none',
        pids_limit=limits.processes + _ENGINES_PIDS,
        mem_limit=memory,
        memswap_limit=memory,
        nano_cpus=int(min(task.cpus, used.info['NCPU']) * 1e9),
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
        log_config={'type': 'none'},  # process 1's words are for us alone, not the host's disk
        init=False,
        runtime=runtime,
    )


def written(used: engine.Engine, name: str) -> int:
    """Bytes in the container's own layer."""
    api = used.client.api
    url = api._url('/containers/{0}/json', name)  # the SDK has no `size` for one container
    return api._result(api._get(url, params={'size': 1}), True).get('SizeRw', 0)


def remove(used: engine.Engine, name: str) -> None:
    """The container, with its own volumes; returns when it is gone, whoever removed it."""
    api, deadline = used.client.api, time.monotonic() + _GONE_SEC
    with contextlib.suppress(docker.errors.NotFound):
        try:
            api.remove_container(name, force=True, v=True)
        except docker.errors.APIError as error:
            if error.status_code != 409:
                raise
            while True:  # the engine is at it already
                api.inspect_container(name)
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def sweep(used: engine.Engine, own: bool = False) -> list[str]:
    """Removes what a dead predecessor of this run and worker left; the names. Images stay.

    Blocks; call it before the first sandbox. Things of other runs and workers stay, as do those of
    a process of this machine that is alive: two workers with one name harm no one. With `own`, call
    it after the last sandbox: an engine that died left what this process could not remove.
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
