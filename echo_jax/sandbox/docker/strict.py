"""A container for tasks from strangers (`sandbox.hardening='strict'`): as little right as will do.

The agent and the verifier are one user without any capability, who can get none. A user that is not
root has a read-only system, and directories of its own in memory (tmpfs of bounded size,
`images.py`), so that nothing it can write reaches a disk; what the image holds there is copied for
each sandbox. Root (`sandbox.user=0`), for tasks that install packages, may write anywhere in the
container's layer, and replace what the verifier runs. What it wrote is only looked at, every second
or so of a command, and a command that wrote too much is killed: a fast writer passes the bound by
what a disk takes in a second, what a background process writes between two commands is found at the
next, and the number of files is not bounded. All sandboxes share the host's kernel: set
`sandbox.runtime` to one that does not (such as 'runsc') where that is not enough.

Process 1 is a bash (scripts/docker_init.sh) that kills, and unpacks files, on requests over the
container's own streams. It runs as the agent's user, but its file cannot be read, so the kernel
keeps all others from tracing it or opening its descriptors; as process 1 it is safe from
`kill -9 -1`, it needs no new process to kill all others, and it reaps what they leave.
"""

import asyncio
import socket
from typing import NamedTuple

import docker

from echo_jax.sandbox import PATH, SandboxError, read_script
from echo_jax.sandbox import shell as shells
from echo_jax.sandbox.docker import containers, engine
from echo_jax.sandbox.docker.images import HOME, Image, Images
from echo_jax.sandbox.docker.shell import STARTUP_SEC, ContainerSandbox
from echo_jax.types import Task

_ENGINES_PIDS = 16  # what opening a shell needs while the agent has all of its own
_SHARED = ('/tmp', '/var/tmp')  # mode 1777


class Limits(NamedTuple):
    """What one container may use; see `StrictSandbox`."""

    memory_mb: int
    disk_mb: int
    processes: int = 256
    files: int = 65_536  # inodes of each directory in memory
    open_files: int = 1_024


class StrictSandbox(ContainerSandbox):
    """One sandbox (docs/design.md#policy-and-sandbox). Start it once; after `stop` it is gone.

    `images` are fitted ones. `limits` are fields of `Limits`: `memory_mb` (if not given the task's,
    or 1024) bounds all processes together, `disk_mb` (likewise) each directory that may be written;
    what lies in memory counts there, with `disk_mb` on top. The rest is `ContainerSandbox`'s.
    """

    _requests: shells.Requests  # to process 1

    def __init__(
        self,
        task: Task,
        *,
        images: Images,
        runtime: str | None = None,
        output_bytes: int = 1 << 20,
        shell: str = 'persistent',
        **limits: int,
    ):
        super().__init__(task, images, runtime, output_bytes, shell)
        asked = {
            '[agent] user': task.agent_user,
            '[verifier] user': task.verifier_user,
            '[environment.healthcheck]': task.healthcheck,
        }
        if any(value is not None for value in asked.values()):
            names = ', '.join(name for name, value in asked.items() if value is not None)
            raise ValueError(
                f"{task.task_id} has {names}, which sandbox.hardening = 'strict' does not follow; "
                "set it to 'docker'"
            )
        limits.setdefault('memory_mb', task.memory_mb or 1024)
        limits.setdefault('disk_mb', task.storage_mb or 1024)
        self._limits = Limits(**limits)
        if images.user:  # only a root can write to the container's layer, which is to be watched
            self.longest_look_sec = 5.0

    def _create(self, image: Image) -> socket.socket:
        script = read_script('put') + read_script('docker_init')
        return containers.begin(
            self.engine,
            self.container_name,
            self.task,
            image=image.name,
            entrypoint=[f'{HOME}/init', '--norc', '--noprofile', '-pc', script, 'init'],
            command=[PATH, f'{HOME}/seeds', *(image.writable if image.user else ())],
            hostname='sandbox',
            user=f'{image.user}:{image.user}',
            environment=image.env,
            working_dir='/',
            healthcheck={'test': ['NONE']},
            host_config=_host_config(self.engine, self.task, image, self._limits, self._runtime),
        )

    async def _await_ready(self, image: Image) -> None:
        self._image_tests = image.tests
        if 'BASH_ENV' in image.env:  # for the shell's children; the shell itself is ours
            self._env = {'BASH_ENV': image.env['BASH_ENV']}
        self._requests = shells.Requests(self._control.write, self._control.read_line)
        async with asyncio.timeout(STARTUP_SEC):
            line = await self._control.read_line()
        if line != 'ready':
            raise SandboxError(f'{self.task.task_id}: {line}')
        await self._lay_environment()

    def _shell_exec(self) -> dict:
        return {
            'cmd': [f'{HOME}/bash', '-pc', read_script('docker_shell'), f'{HOME}/bash'],
            'user': f'{self._images.user}:{self._images.user}',
        }

    async def _start_shell(self, line: str, nonce: str) -> None:
        await super()._start_shell(f'unset HOSTNAME;{line}', nonce)

    async def restore_tests(self) -> None:
        if self._image_tests:
            reply = await self._put('/tests', self._image_tests)
            if reply != 'done':
                raise SandboxError(reply.removeprefix('error '))

    async def _put(self, directory: str, content: bytes) -> str:
        return await self._requests.put(directory, content)

    async def _end_all(self) -> None:
        await self._requests.ask('kill')  # which ends the streams, too

    async def _has_overwritten(self) -> bool:
        limit = self._limits.disk_mb << 20
        return not self._images.user and await self._ask(
            containers.outgrown, self.engine, self.container_name, limit
        )


def _network(used: engine.Engine, runtime: str | None) -> str:
    """The network of sandboxes that reach other machines.

    In Docker's own, 'bridge', they reach each other, too. But gVisor finds no machine by its name
    in any other (https://github.com/google/gvisor/issues/7469).
    """
    return containers.network(used) if containers.is_native(used, runtime) else 'bridge'


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
        network_mode=_network(used, runtime) if task.network else 'none',
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
            docker.types.Ulimit(name='nofile', soft=limits.open_files, hard=limits.open_files),
            docker.types.Ulimit(name='core', soft=0, hard=0),
        ],
        log_config=docker.types.LogConfig(
            type='none'
        ),  # process 1 writes to us alone, not to the host's disk
        init=False,
        runtime=runtime,
    )
