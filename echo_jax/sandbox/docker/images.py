"""A task's Docker image: pulled or built once, fitted for `DockerSandbox`, and kept as a cache.

An image's name is a hash of what it is made from, so that no run builds an unchanged task again.
Fitting is a layer on top of the task's own image (scripts/docker_fit.sh). Builds go through the
engine's own builder (no BuildKit syntax). Starts no container.
"""

import asyncio
import collections
import concurrent.futures
import hashlib
import io
import json
import logging
import math
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import docker
import tenacity

from echo_jax.sandbox import ENVIRONMENT, UID, SandboxError, channels, read_script
from echo_jax.sandbox.docker import engine
from echo_jax.types import Task

log = logging.getLogger(__name__)

HOME = '/usr/lib/echo_jax'  # ours, in every image
# What the agent may write to, besides the workdir and each VOLUME of the image. Among them are
# the paths of Harbor's tasks.
_WRITABLE = ('/app', '/logs', '/root', '/run', '/solution', '/tests', '/tmp', '/var/tmp')


class Image(NamedTuple):
    """A fitted image, and what a sandbox has to know of it."""

    name: str
    user: int  # the agent's uid
    workdir: str
    env: dict[str, str]  # all variables, the task's own included
    writable: tuple[str, ...]  # directories that are the agent's; none lies in another


class Images:
    """The images of one engine's tasks. `user` is the agent's uid: 0 is a root without power.

    `at_once` bounds pulls and builds together; each is tried `attempts` times, and after a failure
    all who ask within `remember_sec` get the same error. `network` says whether builds have a
    network; it has no effect on sandboxes.
    """

    def __init__(
        self,
        engine: engine.Engine,
        *,
        user: int = UID,
        at_once: int = 4,
        attempts: int = 3,
        backoff_sec: float = 2.0,
        remember_sec: float = 60.0,
        network: bool = True,
    ):
        self.engine, self.user = engine, user
        self._attempts, self._backoff_sec, self._network = attempts, backoff_sec, network
        self._remember_sec = remember_sec
        self._pool = concurrent.futures.ThreadPoolExecutor(at_once, 'images')
        self._lock = threading.Lock()
        self._made: dict[tuple, concurrent.futures.Future] = {}
        self._failed: dict[tuple, float] = {}  # time.monotonic() until which a failure holds
        self._names: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    async def image(self, task: Task) -> Image:
        """The task's image, made if need be, and only once however many ask for it.

        Raises SandboxError with the end of the build's output, ValueError for a task that has no
        image or whose environment/ has a link that leads outside.
        """
        key = _key(task)
        with self._lock:
            if time.monotonic() > self._failed.get(key, float('inf')):
                self._made.pop(key, None)
                del self._failed[key]
            if key not in self._made:
                self._made[key] = self._pool.submit(self._make, task, key)
            future = self._made[key]
        return await engine.wait_for(future)

    async def build(
        self,
        tasks: Iterable[Task],
        progress: Callable[[Task, Exception | None], None] = lambda task, error: None,
    ) -> dict[str, str]:
        """Makes the images of all tasks; returns the failures, error by task id."""
        failures = {}

        async def one(task: Task) -> None:
            error = None
            try:
                await self.image(task)
            except (SandboxError, ValueError) as caught:
                error = caught
                failures[task.task_id] = str(caught)
            progress(task, error)

        async with asyncio.TaskGroup() as running:
            for task in tasks:
                running.create_task(one(task))
        return failures

    def forget(self, task: Task) -> None:
        """Has the image looked for again the next time, since the engine no longer has it."""
        with self._lock:
            self._made.pop(_key(task), None)

    def close(self) -> None:
        """Drops what has not begun, waits for what has."""
        self._pool.shutdown(cancel_futures=True)

    # From here on all runs in a thread of the pool.

    def _make(self, task: Task, key: tuple) -> Image:
        try:
            base = self._base(task)
            workdir = task.workdir or '/app'
            if task.workdir is None and base['Config'].get('WorkingDir') not in (None, '', '/'):
                workdir = base['Config']['WorkingDir']
            writable = _outermost({*_WRITABLE, workdir, *(base['Config'].get('Volumes') or ())})
            script = read_script('docker_fit')
            fit = ['/bin/sh', '-c', script, 'fit', str(self.user), HOME, *writable]
            dockerfile = f'FROM {base["Id"]}\nUSER 0\nRUN {json.dumps(fit)}\n'.encode()
            name = f'echo_jax/sandbox:{_hash(dockerfile)}'
            with self._names[name]:
                if self._find(name) is None:
                    self._try(task, 'fitted', self._build, task, name, dockerfile, False)
        except BaseException:
            with self._lock:
                self._failed[key] = time.monotonic() + self._remember_sec
            raise
        env = dict(ENVIRONMENT)
        for line in base['Config'].get('Env') or ():
            variable, _, value = line.partition('=')
            env[variable] = value
        return Image(name, self.user, workdir, env | task.env, writable)

    def _base(self, task: Task) -> dict:
        """The engine's description of the image that the task asks for."""
        environment = task.path / 'environment'
        if task.docker_image:
            name, make = task.docker_image, self._pull
            arguments: tuple = (name,)
        elif (environment / 'Dockerfile').is_file():
            context = channels.archive(environment, '.')
            name, make = f'echo_jax/task:{_fingerprint(context)}', self._build
            arguments = (task, name, context, True)
        else:
            raise ValueError(
                f'{task.path}: no image; give [environment] docker_image or environment/Dockerfile'
            )
        with self._names[name]:
            found = self._find(name)
            if found is None:
                self._try(task, 'pulled' if task.docker_image else 'built', make, *arguments)
                found = self._find(name)
        if found is None:
            raise SandboxError(f'{task.task_id}: the engine lost the image {name}; try again')
        return found

    def _find(self, name: str) -> dict | None:
        try:
            return self.engine.blocking(self.engine.client.api.inspect_image, name)
        except docker.errors.NotFound:
            return None

    def _try(self, task: Task, done: str, make: Callable[..., None], *arguments: object) -> None:
        """`make(...)`, tried again after a growing pause if it fails; a network may be slow."""

        def warn(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning(
                '%s: image not %s: %s; attempt %d follows in %.1f s',
                task.task_id,
                done,
                error,
                state.attempt_number + 1,
                state.upcoming_sleep,
            )

        pause = tenacity.wait_exponential(self._backoff_sec)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(SandboxError),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=pause + tenacity.wait_random(0, self._backoff_sec),
            before_sleep=warn,
            reraise=True,
        )
        try:
            retrying(make, *arguments)
        except SandboxError as error:
            raise SandboxError(f'{task.task_id}: image not {done}: {error}') from None

    def _pull(self, name: str) -> None:
        repository, tag = docker.utils.parse_repository_tag(name)
        try:
            self.engine.blocking(self.engine.client.api.pull, repository, tag or 'latest')
        except docker.errors.NotFound as error:
            raise SandboxError(f'{name}: {engine.brief(error)}') from None

    def _build(self, task: Task, name: str, file: bytes, is_context: bool) -> None:
        """Builds from a tar archive, or from a Dockerfile alone if not `is_context`."""
        self.engine.blocking(self._follow_build, task, name, file, is_context)

    def _follow_build(self, task: Task, name: str, file: bytes, is_context: bool) -> None:
        """One build. Leaving its output unread, as a timeout does, makes the engine give it up."""
        deadline = time.monotonic() + task.build_timeout_sec
        output = collections.deque(maxlen=20)
        events = self.engine.client.api.build(
            fileobj=io.BytesIO(file),
            custom_context=is_context,
            tag=name,
            rm=True,
            forcerm=True,
            decode=True,
            network_mode=None if self._network else 'none',
            labels=self.engine.labels() | {'echo_jax.task': task.task_id},
            timeout=math.ceil(task.build_timeout_sec),  # of silence
        )
        for event in events:
            output.extend(event.get('stream', '').splitlines())
            if 'error' in event:
                tail = '; '.join(filter(None, map(str.strip, [*output, event['error']])))
                raise SandboxError(tail[-1500:])
            if time.monotonic() > deadline:
                raise SandboxError(f'the build took over {task.build_timeout_sec:g} seconds')


def _key(task: Task) -> tuple:
    return task.path, task.docker_image, task.workdir, *sorted(task.env.items())


def _outermost(paths: set[str]) -> tuple[str, ...]:
    """`paths` without those that lie inside another of them, and without `/`."""
    paths = {channels.absolute(path) for path in paths} - {'/'}
    inside = {path for path in paths if any(path.startswith(f'{other}/') for other in paths)}
    return tuple(sorted(paths - inside))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _fingerprint(context: bytes) -> str:
    """A hash of names, modes, links and contents, but not of owners and times."""
    lines = []
    with tarfile.open(fileobj=io.BytesIO(context)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            content = _hash(file.read()) if file else ''
            lines.append(repr((member.name, member.mode, member.type, member.linkname, content)))
    return _hash('\n'.join(lines).encode())
