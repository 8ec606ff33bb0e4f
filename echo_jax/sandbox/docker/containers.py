"""Containers for sandboxes: how one is begun, watched and removed.

Its functions block, so sandboxes call them in threads. Knows nothing of shells and commands.
"""

import contextlib
import io
import os
import socket
import tarfile
from collections.abc import Callable

import docker

from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.docker import engine
from echo_jax.types import Task

_GONE_SEC = 20  # for an engine that is removing a container already
NETWORK = 'echo_jax'  # of containers that reach other machines; strict.py has an exception
# Runtimes whose containers use the network and the root that the engine makes for them.
_NATIVE = ('runc', 'crun', 'io.containerd.runc.v2')


def check_runtime(used: engine.Engine, runtime: str | None) -> None:
    """ValueError if the engine does not know `runtime`; None is its default."""
    known = sorted(used.info.get('Runtimes') or ())
    if runtime is not None and runtime not in known:
        raise ValueError(
            f'sandbox.runtime is {runtime!r}, which the Docker engine {used.url} does not know; '
            f'expected None or one of {", ".join(known)}, or name it in its daemon.json'
        )


def is_native(used: engine.Engine, runtime: str | None) -> bool:
    """Whether containers of `runtime` (None is the engine's default) use the network and the root
    that the engine makes for them. gVisor and virtual machines have their own.
    """
    return (runtime or used.info.get('DefaultRuntime')) in _NATIVE


def begin(
    used: engine.Engine, name: str, task: Task, *, lay: Callable[[], None] | None = None, **how
) -> socket.socket:
    """Starts the container `name` and returns the streams of its process 1.

    `how` is as for the SDK's create_container; `lay` is called before the container starts. The
    container ends when its process 1 does, which is told by the end of its standard input when this
    process is gone. Raises SandboxError, or docker.errors.ImageNotFound if the engine has lost the
    image.
    """
    api = used.client.api
    api.create_container(
        name=name,
        stdin_open=True,  # and closed for good when we are gone, since not detached
        labels=used.labels() | {'echo_jax.task': task.task_id},
        stop_signal='SIGKILL',  # process 1 may heed no other; a restarted engine would wait for it
        **how,
    )
    try:
        if lay is not None:
            lay()
        streams = 'stdin=1&stdout=1&stderr=1&stream=1'
        stream = used.hijack(f'/containers/{name}/attach?{streams}')
        api.start(name)
        return stream
    except BaseException:
        with contextlib.suppress(*engine.FAILURES):
            remove(used, name)
        raise


def begin_exec(used: engine.Engine, name: str, **how) -> tuple[str, socket.socket]:
    """The engine's name of an exec, and its streams; `how` is as for the SDK's exec_create."""
    made = used.client.api.exec_create(name, stdin=True, **how)['Id']
    return made, used.hijack(f'/exec/{made}/start', {'Tty': False, 'Detach': False})


def limits(task: Task, used: engine.Engine, extra_mb: int = 0) -> dict:
    """The task's limits of memory, with `extra_mb` on top, and of CPUs, for create_host_config."""
    found: dict = {}
    if task.memory_mb is not None:
        memory = f'{task.memory_mb + extra_mb}m'
        found |= {'mem_limit': memory, 'memswap_limit': memory}
    if task.cpus is not None:
        found['nano_cpus'] = int(min(task.cpus, used.info['NCPU']) * 1e9)
    return found


def network(used: engine.Engine) -> str:
    """The network of containers that reach other machines, but not each other; made if need be."""
    api = used.client.api
    if not api.networks(names=[f'^{NETWORK}$']):
        try:
            api.create_network(
                NETWORK,
                driver='bridge',
                options={'com.docker.network.bridge.enable_icc': 'false'},
                labels={'echo_jax': 'sandboxes'},
                check_duplicate=True,
            )
        except docker.errors.APIError as error:
            if error.status_code != 409:  # another process made it meanwhile
                raise SandboxError(
                    f'the Docker engine {used.url} makes no bridge network for tasks that want one '
                    f'({engine.brief(error)}); start dockerd without --bridge=none'
                ) from None
    return NETWORK


def put(used: engine.Engine, name: str, directory: str, content: bytes) -> str:
    """Unpacks a tar archive in a container, and makes the directories on the way; 'done', or
    'error' and why not. Links are followed within the container. docker.errors.NotFound if the
    container is gone.
    """
    api = used.client.api
    try:
        try:
            api.put_archive(name, directory, content)
        except docker.errors.NotFound as error:
            if 'No such container' in str(error):
                raise
            make_directory(used, name, directory)
            api.put_archive(name, directory, content)
    except docker.errors.APIError as error:
        if 'No such container' in str(error) or 'is not running' in str(error):
            raise docker.errors.NotFound(str(error)) from None
        return f'error {engine.brief(error)}'
    return 'done'


def make_directory(used: engine.Engine, name: str, path: str) -> None:
    """Makes a directory of a container and its parents, root's, unless they are there."""
    parts = path.strip('/').split('/')
    count = len(parts)
    while count and not exists(used, name, '/' + '/'.join(parts[:count])):
        count -= 1
    missing = ['/'.join(parts[count:end]) for end in range(count + 1, len(parts) + 1)]
    if missing:
        base = '/' + '/'.join(parts[:count])
        used.client.api.put_archive(name, base, folders({path: 0o755 for path in missing}))


def exists(used: engine.Engine, name: str, path: str) -> bool:
    """Whether a container, running or not, has something at `path`."""
    api = used.client.api
    url = f'{api.base_url}/v{api.api_version}/containers/{name}/archive'
    return api.head(url, params={'path': path}, timeout=api.timeout).ok


def folders(modes: dict[str, int]) -> bytes:
    """A tar archive of empty directories of root's, by path, with these modes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for path, mode in modes.items():
            member = tarfile.TarInfo(path)
            member.type, member.mode = tarfile.DIRTYPE, mode
            tar.addfile(member)
    return buffer.getvalue()


def outgrown(used: engine.Engine, name: str, limit: int) -> bool:
    """Whether the container's own layer takes more than `limit` bytes of disk.

    The engine adds up the sizes of files, of which a sparse one may take nothing. So what it says
    is only believed without a count of blocks if there is no way to count them.
    docker.errors.NotFound if the container does not run.
    """
    found = used.client.api.containers(filters={'name': f'^/{name}$'}, size=True)
    if not found:
        raise docker.errors.NotFound(f'no container {name}')
    if found[0].get('SizeRw', 0) <= limit:
        return False
    described = used.client.api.inspect_container(name)
    layer = (described.get('GraphDriver') or {}).get('Data') or {}
    taken = _blocks(used, described['Image'], layer['UpperDir']) if 'UpperDir' in layer else None
    return taken is None or taken > limit


def _blocks(used: engine.Engine, image: str, folder: str) -> int | None:
    """The bytes of disk that a folder of the engine's machine takes; None if it cannot be read."""
    if os.access(folder, os.R_OK | os.X_OK):
        seen = {}  # by inode, since of a hard link there is one
        for parent, _, names in os.walk(folder):
            for name in (parent, *(os.path.join(parent, name) for name in names)):
                with contextlib.suppress(FileNotFoundError):
                    status = os.lstat(name)
                    seen[status.st_dev, status.st_ino] = status.st_blocks * 512
        return sum(seen.values())
    try:
        told = used.client.containers.run(
            image,
            ['-s', '--block-size=1', '/layer'],
            entrypoint=['du'],
            user='0',
            volumes={folder: {'bind': '/layer', 'mode': 'ro'}},
            network_mode='none',
            labels=used.labels(),
            remove=True,
        )
        return int(told.split()[0])
    except (*engine.FAILURES, ValueError, IndexError):
        return None


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
