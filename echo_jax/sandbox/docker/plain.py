"""A container as Docker makes it and Harbor has it (`sandbox.hardening='docker'`), the default.

The task's own image, unchanged: its ENTRYPOINT, USER, WORKDIR, ENV and HEALTHCHECK hold, the
capabilities are Docker's, the root can be written, and no variable is set that Docker would not
set. What the agent's root can do to the host is what Docker lets it do. Limits are the task's.

Commands run in a shell that is an exec, as the agent's user. A command that is ended takes along
what it started, and only that (scripts/docker_kill.sh): a server that an earlier one left runs on.
That is done by another exec, or, if a fork bomb has left no room for one, by a second container in
the same process namespace with a count of its own. The tests run as in Harbor, but out of the reach
of what the agent left running; see `verify.py`.

The disk is looked at about once a second while a command runs, so a fast writer passes the bound by
what a disk takes in a second, and what a background process writes is found at the next command.
"""

import asyncio
import contextlib
import os
import pathlib
import re
import socket
import time

import docker

from echo_jax.sandbox import (
    CommandResult,
    SandboxError,
    SandboxUnavailable,
    Verdict,
    channels,
    healthcheck,
    read_script,
)
from echo_jax.sandbox.docker import containers, engine, verify
from echo_jax.sandbox.docker.images import Image, Images
from echo_jax.sandbox.docker.shell import ContainerSandbox
from echo_jax.sandbox.shell import Ending
from echo_jax.types import Task

_DISK_MB = 10 << 10  # if neither the task nor the recipe names a limit
_KILL_SEC = 15.0  # for what takes a fraction of a second
_KEPT_BYTES = 4_000  # of what the image's own programs print, its end
# What Harbor mounts, and opens to all.
_LOGS = {'logs': 0o755, 'logs/agent': 0o777, 'logs/artifacts': 0o777, 'logs/verifier': 0o777}


class PlainSandbox(ContainerSandbox):
    """One sandbox (docs/design.md#policy-and-sandbox). Start it once; after `stop` it is gone.

    `images` are the tasks' own. `processes` bounds those of the agent and of the image together.
    With `kill_agent_processes` all that the agent left is ended before the tests. If the task names
    no limit, there is none, but for the disk: 10 GiB. The rest is `ContainerSandbox`'s.
    """

    image: Image

    def __init__(
        self,
        task: Task,
        *,
        images: Images,
        runtime: str | None = None,
        output_bytes: int = 1 << 20,
        shell: str = 'persistent',
        processes: int = 512,
        kill_agent_processes: bool = False,
    ):
        super().__init__(task, images, runtime, output_bytes, shell)
        self.processes, self._kill_agent_processes = processes, kill_agent_processes
        self._limit = (task.storage_mb or _DISK_MB) << 20
        self._printed = bytearray()  # by the image's own programs, the end of it
        self._draining: asyncio.Task | None = None
        self._ready = self._began = 0.0  # the agent's part, its last command; time.monotonic()
        self._shell_pid = 0  # in the container

    async def start(self) -> None:
        try:
            await super().start()
        except SandboxError as error:
            ended = self._draining is not None and not self._draining.cancelled()
            if isinstance(error, SandboxUnavailable) or not ended:
                raise
            printed = ' '.join(self._printed.decode(errors='replace').split())[-500:]
            raise SandboxError(
                f'{self.task.task_id}: the container ended at its start (an ENTRYPOINT is to run '
                f'the command that it is given); it printed: {printed or "-"}'
            ) from error

    async def stop(self) -> None:
        if self._draining is not None:
            if not self._ready:  # the end of a container that did not start may yet be told
                await asyncio.wait({self._draining}, timeout=0.2)
            self._draining.cancel()
        await super().stop()

    def _create(self, image: Image) -> socket.socket:
        self.image = image
        task, used = self.task, self.engine
        try:
            return containers.begin(
                self.engine,
                self.container_name,
                self.task,
                image=image.name,
                command=['bash', '-c', read_script('docker_wait')],
                environment=self.task.env,
                host_config=used.client.api.create_host_config(
                    auto_remove=True,
                    network_mode=containers.network(used) if task.network else 'none',
                    ipc_mode='shareable',  # /dev/shm, with the tests' container
                    pids_limit=self.processes,
                    **containers.limits(task, used),
                    oom_score_adj=1000,  # the first that an out-of-memory kernel kills
                    log_config=docker.types.LogConfig(
                        type='none'
                    ),  # what is printed goes to us, not to a disk
                    runtime=self._runtime,
                ),
                lay=self._lay,
            )
        except docker.errors.APIError as error:
            if 'bash' in str(error) and 'not found' in str(error):
                raise SandboxError('the image has no bash; install it') from None
            raise

    def _lay(self) -> None:
        """Lays what Harbor makes into a container that has yet to start. Runs in a thread."""
        api = self.engine.client.api
        api.put_archive(self.container_name, '/', containers.folders(_LOGS))
        if self.task.workdir is not None:
            containers.make_directory(self.engine, self.container_name, self.task.workdir)

    async def _await_ready(self, image: Image) -> None:
        self._draining = asyncio.create_task(self._drain())
        async with asyncio.timeout(self.task.build_timeout_sec):
            if (image.config.get('Healthcheck') or {}).get('Test', ['NONE']) != ['NONE']:
                await self._await_healthy()
            await self._lay_environment()
        await healthcheck.wait(self.task, self._check)
        self._ready = self._began = time.monotonic()

    async def _drain(self) -> None:
        """Reads what the image's programs print, which would block if nobody did."""
        with contextlib.suppress(EOFError):
            while True:
                self._printed += (await self._control.read())[1]
                del self._printed[:-_KEPT_BYTES]

    async def _await_healthy(self) -> None:
        """As `docker compose up --wait` does."""
        while True:
            state = (await self.describe())['State']
            health = state.get('Health') or {}
            if health.get('Status') == 'healthy':
                return
            if health.get('Status') == 'unhealthy':
                told = ' '.join(health['Log'][-1]['Output'].split()) if health.get('Log') else '-'
                raise SandboxError(
                    f"{self.task.task_id}: the image's HEALTHCHECK fails; it printed: {told[-500:]}"
                )
            await asyncio.sleep(0.1)

    async def _check(self, command: str, timeout: float) -> CommandResult:
        """Runs the command of a healthcheck, which is not the agent's."""
        code, told = await self.execute(['bash', '-c', command], timeout)
        return CommandResult(told, '', -1 if code is None else code, code is None)

    async def describe(self) -> dict:
        """The engine's own description of the container."""
        return await self._ask(self.engine.client.api.inspect_container, self.container_name)

    async def is_alive(self) -> bool:
        with contextlib.suppress(docker.errors.NotFound):
            found = self.engine.client.api.inspect_container, self.container_name
            return (await self.engine.call(*found))['State']['Running']
        return False

    async def execute(
        self, command: list[str], timeout: float, **how: object
    ) -> tuple[int | None, str]:
        """The exit code of one exec, and all that it printed; the code of one that is late is None.

        `how` is as for the SDK's exec_create. One that is late runs on.
        """
        how = {'workdir': self._workdir, 'cmd': command} | how
        name, sock = await self._ask(
            lambda: containers.begin_exec(self.engine, self.container_name, **how)
        )
        streams, told = await engine.Streams.open(sock), bytearray()
        try:
            async with asyncio.timeout(timeout):
                with contextlib.suppress(EOFError):
                    while True:
                        told += (await streams.read())[1]
                        del told[: -self._output_bytes]
                while True:  # the engine may be a moment behind
                    state = await self._ask(self.engine.client.api.exec_inspect, name)
                    if not state['Running']:
                        return state['ExitCode'], told.decode(errors='replace')
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return None, told.decode(errors='replace')
        finally:
            streams.close()

    # The agent's shell.

    def _shell_exec(self) -> dict:
        user = '' if self.task.agent_user is None else str(self.task.agent_user)
        command = ['bash', '--norc', '--noprofile', '-s']
        return {'cmd': command, 'user': user, 'workdir': self._workdir}

    async def _start_shell(self, line: str, nonce: str) -> None:
        # A `bash -c` of its own counts its depth from here, as if the engine had started it.
        line = f"export -n SHLVL;builtin printf 'shell %d\\n' $$ >&8;{line}"
        try:
            await super()._start_shell(line, nonce)
        except (EOFError, ConnectionError, TimeoutError):
            self._began = self._ready  # if there is no room for a shell, it is all the agent's
            raise
        if told := re.search(r'^shell (\d+)$', self._greeting, re.MULTILINE):
            self._shell_pid = int(told[1])

    async def _execute(self, command: str, nonce: str, timeout: float) -> tuple[Ending, int]:
        self._began = time.monotonic()
        return await super()._execute(command, nonce, timeout)

    async def _end_all(self) -> None:
        await self.end_since(self._began)

    async def reset(self) -> None:
        """Ends all that began since the sandbox was ready, and opens a fresh shell."""
        self._began = self._ready
        await super().reset()

    async def end_agent(self) -> None:
        """Ends all that began since the sandbox was ready."""
        await self.end_since(self._ready)
        self._close_shell()

    async def end_since(self, moment: float) -> None:
        """Ends the shell and what began since `moment` (time.monotonic()), but no service of
        before that.
        """
        for begin in (self._kill_inside, self._kill_beside):
            try:
                async with asyncio.timeout(_KILL_SEC):
                    streams = await engine.Streams.open(await self._ask(begin))
                    try:
                        uptime = float(await streams.read_line())
                        # A hundredth is the clock's tick, and one more is for rounding.
                        since = int((uptime - (time.monotonic() - moment)) * 100) - 1
                        await streams.write(f'{since}\n'.encode())
                        if await streams.read_line() == 'done':
                            return
                    finally:
                        streams.close()
            except SandboxUnavailable:  # which is waited for
                raise
            except (EOFError, ConnectionError, TimeoutError, ValueError, SandboxError):
                continue
        raise SandboxError('the container died, or what a command left in it cannot be ended')

    def _kill_inside(self) -> socket.socket:
        """Runs in a thread."""
        command = ['bash', '-c', read_script('docker_kill'), 'kill', str(self._shell_pid)]
        return containers.begin_exec(self.engine, self.container_name, cmd=command, user='0')[1]

    def _kill_beside(self) -> socket.socket:
        """Runs in a thread."""
        api = self.engine.client.api
        return containers.begin(
            self.engine,
            f'{self.container_name}-{os.urandom(4).hex()}',
            self.task,
            image=self.image.name,
            entrypoint=['bash', '-c', read_script('docker_kill'), 'kill', str(self._shell_pid)],
            user='0',
            healthcheck={'test': ['NONE']},
            host_config=api.create_host_config(
                auto_remove=True,
                network_mode='none',
                pid_mode=f'container:{self.container_name}',
                pids_limit=16,
                mem_limit='256m',
                log_config=docker.types.LogConfig(type='none'),
                runtime=self._runtime,
            ),
        )

    async def _has_overwritten(self) -> bool:
        return await self._ask(containers.outgrown, self.engine, self.container_name, self._limit)

    async def watch_disk(self) -> None:
        """Returns when more was written than the sandbox may."""
        while not await self._too_much_written():
            await asyncio.sleep(1.0)

    # Files and tests.

    async def _put(self, directory: str, content: bytes) -> str:
        return await self._ask(containers.put, self.engine, self.container_name, directory, content)

    async def put_archive(self, directory: str, content: bytes) -> None:
        """Unpacks a tar archive. SandboxError if that cannot be."""
        reply = await self._put(directory, content)
        if reply != 'done':
            raise SandboxError(f'cannot unpack into {directory}: {reply.removeprefix("error ")}')

    async def upload(self, path: pathlib.Path, target: str) -> None:
        """Copies a file to the path `target`, or a directory's content into it, as `docker cp`:
        modes are kept, and all is root's.
        """
        self._require_running()
        async with self._lock:
            await self.put_archive(*channels.packed(path, target, keep_modes=True))

    async def solve(self) -> CommandResult:
        script = self.task.path / 'solution' / 'solve.sh'
        if not script.is_file():
            raise ValueError(f'{script} is missing; the oracle runs it')
        self._require_running()
        solution = channels.packed(
            script.parent, '/solution', keep_modes=True, programs=['solve.sh']
        )
        async with self._lock:
            await self.put_archive(*solution)
        env = {'DEBIAN_FRONTEND': 'noninteractive'} | self.task.solution_env
        return await self.run_apart('(/solution/solve.sh)', self.task.agent_timeout_sec, env)

    async def restore_tests(self) -> None:
        if self.image.tests:
            await self.put_archive('/tests', self.image.tests)

    async def verify(self) -> Verdict:
        """Runs the task's tests beside what the agent left running, and reads the reward."""
        self._require_running()
        async with self._lock:
            if self._kill_agent_processes:
                await self.end_agent()
            elif self._unclean:
                await self._kill()
            self._close_shell()
            return await verify.verify(self, self._images, self._runtime)
