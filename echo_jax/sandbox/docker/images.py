"""A task's Docker image: pulled or built once, and kept as a cache.

An image's name is a hash of what it is made from, the ids of its bases included, so that no run
builds an unchanged task again, and the next run sees a base that was made anew. Builds go through
the engine's own builder (`builds.py`). For `strict.py` an image is fitted: a layer on top of the
task's own (scripts/docker_fit.sh). Starts no container.
"""

import asyncio
import collections
import concurrent.futures
import hashlib
import io
import json
import logging
import tarfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple

import docker
import tenacity

from echo_jax.sandbox import ENVIRONMENT, SandboxError, channels, read_script
from echo_jax.sandbox.docker import builds, containers, contexts, engine
from echo_jax.sandbox.dockerfiles import parser
from echo_jax.types import Task

log = logging.getLogger(__name__)

HOME = '/usr/lib/echo_jax'  # ours, in every fitted image
# What makes pytest behave otherwise, if it lies in a directory above the tests.
PYTEST_FILES = frozenset(
    ('pytest.ini', '.pytest.ini', 'pyproject.toml', 'tox.ini', 'setup.cfg', 'conftest.py')
)
TOOLS = 'debian:bookworm-slim'  # trusted, with bash, tar, mount and setpriv; see verify.py
# What the agent may write to, besides the workdir and each VOLUME of the image. Among them are
# the paths of Harbor's tasks.
_WRITABLE = ('/app', '/logs', '/root', '/run', '/solution', '/tests', '/tmp', '/var/tmp')


class Image(NamedTuple):
    """An image, and what a sandbox has to know of it."""

    name: str  # of the fitted image, or the id of the task's own
    workdir: str
    env: dict[str, str]  # all variables, the task's own included
    tests: bytes  # what the image itself has in /tests, as a tar archive; b'' without one
    pytest_files: frozenset[str]  # of PYTEST_FILES, what the image itself has in its root
    config: dict  # the engine's own description: Config of the task's image
    user: int | None = None  # the agent's uid in a fitted image
    writable: tuple[str, ...] = ()  # its directories that are the agent's; none lies in another


class Images:
    """The images of one engine's tasks. `user` is the agent's uid in images that are fitted for
    `strict.py` (0 is a root without power); with None they are the tasks' own.

    `at_once` bounds pulls and builds together; each is tried `attempts` times, and after a failure
    all who ask within `remember_sec` get the same error. `network` says whether builds have a
    network; it has no effect on sandboxes.
    """

    def __init__(
        self,
        engine: engine.Engine,
        *,
        user: int | None = None,
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
        self._contents: dict[str, tuple[bytes, frozenset[str]]] = {}  # by image id
        self._tools: concurrent.futures.Future | None = None
        self._unprotected = '', 0.0  # and time.monotonic() until which that holds
        self.protects = False  # whether tests have run out of an agent's reach; see verify.py

    async def image(self, task: Task) -> Image:
        """The task's image, made if need be, and only once however many ask for it.

        Raises SandboxError with the end of the build's output, ValueError for a task that has no
        image or whose environment/ has a link that leads outside.
        """
        key = _key(task)
        if task.docker_image:  # the tag may name another image by now
            key += ((await self.engine.call(self._find, task.docker_image) or {}).get('Id'),)
        with self._lock:
            if time.monotonic() > self._failed.get(key, float('inf')):
                self._made.pop(key, None)
                del self._failed[key]
            if key not in self._made:
                self._made[key] = self._pool.submit(self._make, task, key)
            future = self._made[key]
        return await engine.wait_for(future)

    @property
    def unprotected(self) -> str:
        """Why tests cannot run out of the agents' reach (see verify.py); '' if they can, or if that
        was found out over `remember_sec` ago.
        """
        reason, until = self._unprotected
        return reason if time.monotonic() < until else ''

    @unprotected.setter
    def unprotected(self, reason: str) -> None:
        self._unprotected = reason, time.monotonic() + self._remember_sec

    async def tools(self) -> str:
        """The id of the image TOOLS, pulled if need be. SandboxError if it cannot be."""
        with self._lock:
            if self._tools is None or (self._tools.done() and self._tools.exception()):
                self._tools = self._pool.submit(self._pulled, 'the tests', TOOLS)
        return (await engine.wait_for(self._tools))['Id']

    async def build(
        self,
        tasks: Iterable[Task],
        progress: Callable[[Task, Exception | None], None] = lambda task, error: None,
    ) -> dict[str, str]:
        """Makes the images of all tasks, and pulls TOOLS if the tests will want it; returns the
        failures, error by task id or TOOLS.
        """
        failures = {}

        async def one(name: str, making: Awaitable) -> Exception | None:
            try:
                await making
            except Exception as error:  # one bad task never ends a build, whatever is wrong with it
                failures[name] = ' '.join(str(error).split()) or type(error).__name__
                return error
            return None

        async def of_task(task: Task) -> None:
            progress(task, await one(task.task_id, self.image(task)))

        async with asyncio.TaskGroup() as running:
            if self.user is None:
                running.create_task(one(TOOLS, self.tools()))
            for task in tasks:
                running.create_task(of_task(task))
        return failures

    def forget(self, task: Task) -> None:
        """Has the image looked for again the next time, since the engine no longer has it."""
        with self._lock:
            for key in [key for key in self._made if key[: len(_key(task))] == _key(task)]:
                self._made.pop(key)

    def close(self) -> None:
        """Drops what has not begun, waits for what has."""
        self._pool.shutdown(cancel_futures=True)

    # From here on all runs in a thread of the pool.

    def _make(self, task: Task, key: tuple) -> Image:
        try:
            base = self._base(task)
            config = base['Config']
            contents = self._contents_of(base['Id'])
            if self.user is not None:
                return self._fitted(task, base, contents)
        except BaseException:
            with self._lock:
                self._failed[key] = time.monotonic() + self._remember_sec
            raise
        workdir = task.workdir or config.get('WorkingDir') or '/'
        return Image(base['Id'], workdir, _variables(config) | task.env, *contents, config)

    def _fitted(self, task: Task, base: dict, contents: tuple[bytes, frozenset[str]]) -> Image:
        config = base['Config']
        workdir = task.workdir or '/app'
        if task.workdir is None and config.get('WorkingDir') not in (None, '', '/'):
            workdir = config['WorkingDir']
        writable = _outermost({*_WRITABLE, workdir, *(config.get('Volumes') or ())})
        script = read_script('docker_fit')
        fit = ['/bin/sh', '-c', script, 'fit', str(self.user), HOME, *writable]
        # BuildKit takes an image by a name alone, and the task's own may come to mean another.
        self.engine.blocking(
            self.engine.client.api.tag, base['Id'], 'echo_jax/base', _short(base['Id'])
        )
        lines = f'FROM echo_jax/base:{_short(base["Id"])}\nUSER 0\nRUN {json.dumps(fit)}\n'
        fitted = f'echo_jax/sandbox:{_hash(lines.encode())}'
        with self._names[fitted]:
            if self._find(fitted) is None:
                make = self._build, task, fitted, _one_file(lines), False
                self._try(task.task_id, 'fitted', *make)
        env = ENVIRONMENT | _variables(config) | task.env
        return Image(fitted, workdir, env, *contents, config, self.user, writable)

    def _base(self, task: Task) -> dict:
        """The engine's description of the image that the task asks for."""
        environment = task.path / 'environment'
        if task.docker_image:
            return self._pulled(task.task_id, task.docker_image)
        if not (environment / 'Dockerfile').is_file():
            raise ValueError(
                f'{task.path}: no image; give [environment] docker_image or environment/Dockerfile'
            )
        context = contexts.pack(environment)
        # What is no UTF-8 may stand in a comment; the builder knows.
        parsed = parser.parse(environment / 'Dockerfile', errors='replace')
        bases = [self._pulled(task.task_id, base)['Id'] for base in contexts.bases(parsed)]
        name = f'echo_jax/task:{_fingerprint(context, bases)}'
        make = self._build, task, name, context, self._network
        return self._found(task.task_id, name, 'built', *make)

    def _pulled(self, asker: str, name: str) -> dict:
        return self._found(asker, name, 'pulled', self._pull, name)

    def _found(self, asker: str, name: str, done: str, make: Callable, *arguments) -> dict:
        """The description of the image `name`, made by `make` if the engine does not have it.
        Messages begin with `asker`, a task's id.
        """
        with self._names[name]:
            found = self._find(name)
            if found is None:
                self._try(asker, done, make, *arguments)
                found = self._find(name)
        if found is None:
            raise SandboxError(f'{asker}: the engine lost the image {name}; try again')
        return found

    def _contents_of(self, image: str) -> tuple[bytes, frozenset[str]]:
        """`Image.tests` and `Image.pytest_files`."""
        with self._names[image]:
            if image not in self._contents:
                self._contents[image] = self.engine.blocking(_read, self.engine, image)
        return self._contents[image]

    def _find(self, name: str) -> dict | None:
        try:
            return self.engine.blocking(self.engine.client.api.inspect_image, name)
        except docker.errors.NotFound:
            return None

    def _try(self, asker: str, done: str, make: Callable[..., None], *arguments: object) -> None:
        """`make(...)`, tried again after a growing pause if it fails; a network may be slow."""

        def warn(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            log.warning(
                '%s: image not %s: %s; attempt %d follows in %.1f s',
                asker,
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
            raise error.of(f'{asker}: image not {done}') from None

    def _pull(self, name: str) -> None:
        repository, tag = docker.utils.parse_repository_tag(name)
        try:
            self.engine.blocking(self.engine.client.api.pull, repository, tag or 'latest')
        except docker.errors.NotFound as error:
            raise SandboxError(f'{name}: {engine.brief(error)}') from None
        except SandboxError as error:
            raise error.of(name) from None

    def _build(self, task: Task, name: str, context: bytes, network: bool) -> None:
        self.engine.blocking(
            builds.build,
            self.engine,
            context,
            name,
            labels=self.engine.labels() | {'echo_jax.task': task.task_id},
            network=network,
            timeout_sec=task.build_timeout_sec,
        )


def _read(used: engine.Engine, image: str) -> tuple[bytes, frozenset[str]]:
    """Of an image: `Image.tests` and `Image.pytest_files`."""
    api = used.client.api
    made = api.create_container(image, ['true'], labels=used.labels())['Id']
    try:
        found = {name for name in PYTEST_FILES if containers.exists(used, made, f'/{name}')}
        tests = b''
        if containers.exists(used, made, '/tests/.'):
            tests = b''.join(api.get_archive(made, '/tests/.')[0])
        return tests, frozenset(found)
    finally:
        api.remove_container(made, v=True)


def _key(task: Task) -> tuple:
    return task.path, task.docker_image, task.workdir, *sorted(task.env.items())


def _outermost(paths: set[str]) -> tuple[str, ...]:
    """`paths` without those that lie inside another of them, and without `/`."""
    paths = {channels.absolute(path) for path in paths} - {'/'}
    inside = {path for path in paths if any(path.startswith(f'{other}/') for other in paths)}
    return tuple(sorted(paths - inside))


def _variables(config: dict) -> dict[str, str]:
    return dict(line.partition('=')[::2] for line in config.get('Env') or ())


def _short(image: str) -> str:
    """A tag made of an image's id."""
    return image.partition(':')[2][:32]


def _one_file(dockerfile: str) -> bytes:
    """A context of nothing but a Dockerfile."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        member = tarfile.TarInfo('Dockerfile')
        member.size = len(dockerfile.encode())
        tar.addfile(member, io.BytesIO(dockerfile.encode()))
    return buffer.getvalue()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _fingerprint(context: bytes, bases: list[str]) -> str:
    """A hash of the bases and of names, modes, links and contents, but not of owners and times."""
    lines = list(bases)
    with tarfile.open(fileobj=io.BytesIO(context)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            content = _hash(file.read()) if file else ''
            lines.append(repr((member.name, member.mode, member.type, member.linkname, content)))
    return _hash('\n'.join(lines).encode())
