"""The tests for `plain.py`: as in Harbor, but out of the reach of what the agent left running.

A service that the agent left stays, since a task may ask for one. But a loop of the agent's must
neither write the reward nor change the tests, and as root of the same container it could. So the
tests run in a container of their own (scripts/docker_verify.sh), whose root is made of the
directories of the agent's container, except /tests and /logs/verifier, which are its own;
processes, network, /dev/shm and volumes are shared with the agent's. In it the tests have Docker's
own capabilities and one more, which keeps the agent's processes from tracing them. Two things
differ from Harbor: a file cannot be renamed or linked from one directory of the root to another (as
over mounts), and what the agent's services make anew in the root itself is not seen.

That container may mount, so none but a trusted image will do, Debian's, and nothing of the agent's
runs in it with that right. If there is no such image, or the engine keeps a container's root in no
directory (another runtime, another storage), the tests run in the agent's container itself, as in
Harbor; the engine is asked anew when other failures are forgotten, too. Then there is only this: if
a reward comes back after it was removed, before any test runs, all that the agent left is ended.

The agent can hinder that container, by what it changes in its root meanwhile or by killing what
makes the tests' root. So on an engine that has made such a root before, all that the agent left is
ended and there is one more try. If that fails too, it is this one task's affair.

What stays, in both ways: the tests use the programs of the agent's container, and its root may
have replaced those; a service may hand the tests whatever it likes.
"""

import asyncio
import contextlib
import json
import logging
import math
from typing import Protocol

import docker

from echo_jax.sandbox import PATH, SandboxError, Verdict, channels, read_script
from echo_jax.sandbox.docker import containers, engine
from echo_jax.sandbox.docker.images import PYTEST_FILES, Image, Images
from echo_jax.sandbox.verifier import MAX_REWARD_BYTES, OUTPUT_BYTES, no_reward, read_verdict
from echo_jax.types import Task

log = logging.getLogger(__name__)

_SETUP_SEC = 60.0
_REMOVED = 'marked for removal'  # the engine's words for a container that somebody removes
_LOOK_SEC = 0.3  # for a loop of the agent's to write a reward once more
# What Docker's own profile forbids and a container with the right to mount would have. `mount` and
# its like are open, to those who have that right. Namespaces: clone's flags, all but threads'.
_FORBIDDEN = (
    'acct add_key bpf clock_adjtime clock_settime create_module delete_module fanotify_init '
    'finit_module fsconfig fsmount fsopen fspick get_kernel_syms init_module io_uring_enter '
    'io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl '
    'lookup_dcookie mbind migrate_pages move_mount move_pages name_to_handle_at nfsservctl '
    'open_by_handle_at open_tree perf_event_open pivot_root process_madvise query_module quotactl '
    'quotactl_fd reboot request_key set_mempolicy setdomainname sethostname setns settimeofday '
    'stime swapoff swapon syslog sysfs umount unshare uselib userfaultfd ustat vhangup vm86 vm86old'
)
_NAMESPACES = 0x7E020000
_SECCOMP = {
    'defaultAction': 'SCMP_ACT_ALLOW',
    'syscalls': [
        {'names': _FORBIDDEN.split(), 'action': 'SCMP_ACT_ERRNO', 'errnoRet': 1},
        {'names': ['clone3'], 'action': 'SCMP_ACT_ERRNO', 'errnoRet': 38},  # so clone is used
        *(
            {
                'names': ['clone'],
                'action': 'SCMP_ACT_ERRNO',
                'errnoRet': 1,
                'args': [{'index': 0, 'value': flag, 'valueTwo': flag, 'op': 'SCMP_CMP_MASKED_EQ'}],
            }
            for flag in (1 << bit for bit in range(32))
            if flag & _NAMESPACES
        ),
    ],
}


class Running(Protocol):
    """What `verify` needs of a container; see plain.py, which imports this module."""

    task: Task
    image: Image
    engine: engine.Engine
    container_name: str
    processes: int

    async def describe(self) -> dict: ...

    async def is_alive(self) -> bool: ...

    async def execute(
        self, command: list[str], timeout: float, **how: object
    ) -> tuple[int | None, str]: ...

    async def end_agent(self) -> None: ...

    async def watch_disk(self) -> None: ...

    async def put_archive(self, directory: str, content: bytes) -> None: ...

    async def restore_tests(self) -> None: ...


class Unprotected(Exception):
    """Why the tests cannot run out of the agent's reach."""


class Changed(Unprotected):
    """What of the agent's container changed while the tests' root was made of it."""


async def verify(sandbox: Running, images: Images, runtime: str | None) -> Verdict:
    """The reward of the task's tests, or 0 and why there is none."""
    try:
        tests = channels.archive(
            sandbox.task.path / 'tests', '.', keep_modes=True, programs=['test.sh']
        )
    except FileNotFoundError:
        return no_reward(f'{sandbox.task.task_id} has no tests/')
    described = await sandbox.describe()
    try:
        if images.unprotected:
            raise Unprotected(images.unprotected)
        return await _beside(sandbox, images, runtime, described, tests)
    except Unprotected as reason:
        if not images.unprotected:
            images.unprotected = str(reason)
            log.warning('tests run within the reach of what agents leave running: %s', reason)
    return await _inside(sandbox, tests)


async def _beside(
    sandbox: Running, images: Images, runtime: str | None, described: dict, tests: bytes
) -> Verdict:
    """In a container of their own. Unprotected if the engine allows none."""
    root = _root(images.engine, described)
    try:
        tools = await images.tools()
    except SandboxError as error:
        if not await sandbox.is_alive():
            raise
        raise Unprotected(str(error)) from None
    archives = (sandbox.image.tests, tests)
    how = {
        'image': tools,
        'command': _command(sandbox, described, archives),
        'host_config': _host_config(sandbox, described, runtime, root, sum(map(len, archives))),
    }
    # For services that look at them; what the agent made of /tests is its own affair.
    with contextlib.suppress(SandboxError):
        await sandbox.restore_tests()
        await sandbox.put_archive('/tests', tests)
    try:
        return await _apart(sandbox, images, how, archives)
    except Unprotected:
        if not images.protects:
            raise
    await sandbox.end_agent()
    try:
        return await _apart(sandbox, images, how, archives)
    except Changed as reason:
        return no_reward(f"no root for the tests can be made of the container's: {reason}")
    except Unprotected as reason:
        log.warning(
            '%s: tests run in the container of the agent, whose processes were ended: %s',
            sandbox.task.task_id,
            reason,
        )
        return await _inside(sandbox, tests)


async def _apart(
    sandbox: Running, images: Images, how: dict, archives: tuple[bytes, ...]
) -> Verdict:
    """One try of `_beside`; `how` is as for the SDK's create_container."""
    name = f'{sandbox.container_name}-tests'
    try:
        beginning = images.engine.submit(
            containers.begin,
            images.engine,
            name,
            sandbox.task,
            entrypoint=['bash', '-c', _script(), 'verify'],
            user='0',
            healthcheck={'test': ['NONE']},
            **how,
        )
        streams = await engine.Streams.open(await engine.wait_for(beginning))
    except docker.errors.NotFound as error:  # somebody removed it as it was started
        raise SandboxError(f"the tests' container is gone: {engine.brief(error)}") from None
    except SandboxError as error:
        if _REMOVED in str(error) or not await sandbox.is_alive():
            raise
        raise Unprotected(str(error)) from None
    told = bytearray()
    limit = sandbox.task.verifier_timeout_sec
    watching = asyncio.create_task(sandbox.watch_disk())
    reading = asyncio.create_task(_converse(streams, archives, told))
    both = {watching, reading}
    try:
        done, _ = await asyncio.wait(
            both, timeout=limit + _SETUP_SEC, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        for running in both:
            running.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        streams.close()
        with contextlib.suppress(SandboxError):
            await images.engine.call(containers.remove, images.engine, name)
    if watching in done:
        watching.result()  # raises what went wrong; else it has ended because the disk is full
        return no_reward('the tests, or what the agent left running, filled the disk')
    if not await sandbox.is_alive():
        raise SandboxError(f'{sandbox.task.task_id}: the container died')
    ending, _, verdict = told.decode(errors='replace').partition('\n')
    if ending.startswith('unable'):
        raise Unprotected(ending)
    images.protects = images.protects or ending.startswith(('changed', 'done', 'late'))
    if ending.startswith('changed'):
        raise Changed(ending)
    if reading in done and ending not in ('done', 'late'):
        return no_reward(f'the tests or their container were killed {ending[:200]}')
    return read_verdict(verdict, None if ending == 'done' else limit)


async def _converse(streams: engine.Streams, archives: tuple[bytes, ...], told: bytearray) -> None:
    """Gives the script its archives, and reads what it prints, which goes to `told`."""

    async def give() -> None:
        for archive in archives:
            await streams.write(archive)

    giving = asyncio.create_task(give())
    try:
        while len(told) < 2 * MAX_REWARD_BYTES:
            number, chunk = await streams.read()
            if number == 1:
                told += chunk
    except EOFError:
        pass
    finally:
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)


def _script() -> str:
    numbers = f'set -- {MAX_REWARD_BYTES} {OUTPUT_BYTES}\n'
    return read_script('docker_verify') + numbers + read_script('verifier_read')


def _command(sandbox: Running, described: dict, archives: tuple[bytes, ...]) -> list[str]:
    """The arguments of scripts/docker_verify.sh."""
    task, image = sandbox.task, sandbox.image
    user = image.config.get('User') if task.verifier_user is None else str(task.verifier_user)
    env = {'HOSTNAME': described['Config']['Hostname']} | image.env | task.verifier_env
    # In a task that works in the root, it may be the agent's task to write them.
    left_out = PYTEST_FILES - image.pytest_files if image.workdir != '/' else ()
    env.setdefault('PATH', PATH)
    return [
        user or '0:0',
        image.workdir,
        f'{task.verifier_timeout_sec:g}',
        *(str(len(archive)) for archive in archives),
        read_script('docker_tests'),
        ' '.join(left_out),
        *(f'{name}={value}' for name, value in env.items()),
    ]


def _root(used: engine.Engine, described: dict) -> str:
    """Where the engine's machine has the root of a running container."""
    runtime = described['HostConfig']['Runtime']
    if not containers.is_native(used, runtime):
        raise Unprotected(f'the runtime {runtime} keeps its own root')
    layers = described.get('GraphDriver') or {}
    if 'MergedDir' in (layers.get('Data') or {}):
        return layers['Data']['MergedDir']
    # The place that an engine with containerd's image store mounts it at.
    return f'{used.info["DockerRootDir"]}/rootfs/{used.info["Driver"]}/{described["Id"]}'


def _host_config(
    sandbox: Running, described: dict, runtime: str | None, root: str, size: int
) -> dict:
    api = sandbox.engine.client.api
    shared = f'container:{described["Id"]}'
    # The engine mounts these, in order of depth, since it heeds links on the way to them.
    binds = [f'{root}:/x']
    for key, name in (
        ('HostsPath', 'hosts'),
        ('HostnamePath', 'hostname'),
        ('ResolvConfPath', 'resolv.conf'),
    ):
        if described.get(key):
            binds.append(f'{described[key]}:/x/etc/{name}')
    for mount in described['Mounts']:
        binds.append(f'{mount.get("Name") or mount["Source"]}:/x{mount["Destination"]}')
    extra_mb = 64 + math.ceil(2 * size / (1 << 20))  # for what lies in memory here
    return api.create_host_config(
        auto_remove=True,
        binds=binds,
        read_only=True,
        tmpfs={'/r': 'rw,exec,suid,dev,mode=755', '/logs': 'rw,exec,suid,dev,mode=755'},
        pid_mode=shared,
        network_mode=shared,
        ipc_mode=shared,
        cap_add=['SYS_ADMIN', 'WAKE_ALARM'],
        security_opt=[f'seccomp={json.dumps(_SECCOMP)}', 'apparmor=unconfined', 'label=disable'],
        pids_limit=sandbox.processes,
        **containers.limits(sandbox.task, sandbox.engine, extra_mb),
        oom_score_adj=1000,
        log_config=docker.types.LogConfig(type='none'),
        runtime=runtime,
    )


async def _inside(sandbox: Running, tests: bytes) -> Verdict:
    """In the agent's container, as in Harbor."""
    task = sandbox.task
    user = {} if task.verifier_user is None else {'user': str(task.verifier_user)}
    as_root = {'user': '0', 'workdir': '/'}
    look = ['bash', '-c', read_script('docker_look')]
    clear = ['bash', '-c', read_script('docker_clear') + read_script('docker_look')]
    code, before = await sandbox.execute(clear, _SETUP_SEC, **as_root)
    await asyncio.sleep(_LOOK_SEC)
    back, after = await sandbox.execute(look, _SETUP_SEC, **as_root)
    if code or back or before != after:
        await sandbox.end_agent()
        code, _ = await sandbox.execute(clear, _SETUP_SEC, **as_root)
        if code != 0:
            return no_reward('what the agent left in /tests or /logs/verifier cannot be removed')
    try:
        await sandbox.restore_tests()
        await sandbox.put_archive('/tests', tests)
    except SandboxError as error:
        if not await sandbox.is_alive():
            raise
        return no_reward(f'the tests cannot be put into the sandbox: {error}')
    script = ['bash', '-c', read_script('docker_tests'), 'bash', sandbox.image.workdir]
    limit = task.verifier_timeout_sec
    code, _ = await sandbox.execute(script, limit, environment=task.verifier_env, **user)
    numbers = f'set -- {MAX_REWARD_BYTES} {OUTPUT_BYTES}\n'
    read = ['bash', '-c', numbers + read_script('verifier_read')]
    _, told = await sandbox.execute(read, _SETUP_SEC, **as_root)
    return read_verdict(told, late=limit if code is None else None)
