"""A task's Docker image: pulled or built once, then fitted for `docker.py`, and kept as a cache.

An image's name is a hash of what it is made from, so that an unchanged task is never built twice,
by whatever run. Builds go through the engine's own builder (no BuildKit syntax). Starts nothing.
"""

import asyncio
import collections
import concurrent.futures
import hashlib
import io
import json
import logging
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import docker

from echo_jax.sandbox import SandboxError, channels
from echo_jax.sandbox.docker import engine
from echo_jax.sandbox.local import namespaces
from echo_jax.types import Task

log = logging.getLogger(__name__)

HOME = '/usr/lib/echo_jax'  # ours, in every image
# The agent's, besides the workdir and what the image calls a VOLUME. Harbor's paths among them.
_WRITABLE = ('/app', '/logs', '/root', '/run', '/solution', '/tests', '/tmp', '/var/tmp')
# Adds to an image, as root: a shell that may be run but not read, so that the kernel lets nobody
# trace it (process 1, see `docker.py`); the agent's account; and, since the agent's directories
# will be tmpfs, a copy of what they hold. apt of an agent that is root must not change its user.
_FIT = r"""
set -e
user=$1; shift
bash=$(command -v bash) || { echo 'the image has no bash; install it'; exit 1; }
mkdir -p HOME/seeds /logs/agent /logs/verifier /logs/artifacts "$@"
cp "$bash" HOME/init && chmod 0111 HOME/init && ln -sf "$bash" HOME/bash
known() { grep -q "^[^:]*:[^:]*:$user:" "$1"; }
known /etc/passwd || echo "agent:x:$user:$user::/root:/bin/bash" >>/etc/passwd
known /etc/group || echo "agent:x:$user:" >>/etc/group
if [ "$user" = 0 ]; then
  [ ! -d /etc/apt ] || echo 'APT::Sandbox::User "root";' >/etc/apt/apt.conf.d/99echo_jax
  for d in /var/cache/apt/archives/partial /var/lib/apt/lists/partial; do
    [ ! -d $d ] || chown 0:0 $d
  done
  exit
fi
for d; do
  [ -n "$(ls -A "$d")" ] || continue
  mkdir -p "HOME/seeds$d" && cp -a "$d/." "HOME/seeds$d"
done
chown -R "$user:$user" HOME/seeds && chmod -R u+rwX HOME/seeds
""".replace('HOME', HOME)


class Image(NamedTuple):
    name: str
    user: int  # the agent's uid
    workdir: str
    env: dict[str, str]  # all variables, the task's own included
    writable: tuple[str, ...]  # directories that are the agent's; none lies in another


class Images:
    """The images of one engine's tasks. `user` is the agent's uid: 0 is a root without power.

    `at_once` bounds pulls and builds together; each is tried `attempts` times, and a failure is the
    answer to all who ask within `remember_sec`. `network` is that of builds, not of sandboxes.
    """

    def __init__(
        self,
        engine: engine.Engine,
        *,
        user: int = namespaces.UID,
        at_once: int = 4,
        attempts: int = 3,
        backoff_sec: float = 2.0,
        remember_sec: float = 60.0,
        network: bool = True,
        seed: int = 0,
    ):
        self.engine, self.user = engine, user
        self._attempts, self._backoff_sec, self._network = attempts, backoff_sec, network
        self._remember_sec = remember_sec
        self._pool = concurrent.futures.ThreadPoolExecutor(at_once, 'images')
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._made: dict[tuple, concurrent.futures.Future] = {}
        self._failed: dict[tuple, float] = {}  # time.monotonic() until which a failure holds
        self._names: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    async def image(self, task: Task) -> Image:
        """The task's image, made if need be, once however many ask.

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
        """Makes the images of all; returns what failed, error by task id. `progress` sees each."""
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
        """Looks again the next time: the engine no longer has the image."""
        with self._lock:
            self._made.pop(_key(task), None)

    def close(self) -> None:
        """Drops what has not begun, waits for what has."""
        self._pool.shutdown(cancel_futures=True)

    # In a thread of the pool from here on.

    def _make(self, task: Task, key: tuple) -> Image:
        try:
            base = self._base(task)
            workdir = task.workdir
            if workdir == Task.workdir and base['Config'].get('WorkingDir') not in (None, '', '/'):
                workdir = base['Config']['WorkingDir']
            writable = _outermost({*_WRITABLE, workdir, *(base['Config'].get('Volumes') or ())})
            fit = ['/bin/sh', '-c', _FIT, 'fit', str(self.user), *writable]
            recipe = f'FROM {base["Id"]}\nUSER 0\nRUN {json.dumps(fit)}\n'
            name = f'echo_jax/sandbox:{_hash(recipe.encode())}'
            with self._names[name]:
                if self._find(name) is None:
                    self._try(task, 'fitted', self._build, task, name, _context_of(recipe))
        except BaseException:
            with self._lock:
                self._failed[key] = time.monotonic() + self._remember_sec
            raise
        own = dict(line.partition('=')[::2] for line in base['Config'].get('Env') or ())
        env = namespaces.ENVIRONMENT | own | task.env
        return Image(name, self.user, workdir, env, writable)

    def _base(self, task: Task) -> dict:
        """The engine's description of the image that the task asks for."""
        environment = task.path / 'environment'
        if task.docker_image:
            name, make = task.docker_image, self._pull
            arguments = (name,)
        elif (environment / 'Dockerfile').is_file():
            context = channels.archive(environment, '.')
            name, make = f'echo_jax/task:{_fingerprint(context)}', self._build
            arguments = (task, name, context)
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

    def _try(self, task: Task, done: str, make: Callable, *arguments) -> None:
        """`make(...)`, again after a pause that doubles where it fails; a network may be slow."""
        for attempt in range(1, self._attempts + 1):
            try:
                return make(*arguments)
            except SandboxError as error:
                failure = f'{task.task_id}: image not {done}: {error}'
            if attempt < self._attempts:
                pause = self._backoff_sec * 2**attempt * (0.5 + self._random.random() / 2)
                log.warning('%s; attempt %d follows in %.1f s', failure, attempt + 1, pause)
                time.sleep(pause)
        raise SandboxError(failure)

    def _pull(self, name: str) -> None:
        repository, tag = docker.utils.parse_repository_tag(name)
        try:
            self.engine.blocking(self.engine.client.api.pull, repository, tag or 'latest')
        except docker.errors.NotFound as error:
            raise SandboxError(f'{name}: {engine.brief(error)}') from None

    def _build(self, task: Task, name: str, context: bytes) -> None:
        self.engine.blocking(self._follow_build, task, name, context)

    def _follow_build(self, task: Task, name: str, context: bytes) -> None:
        """One build. Leaving its output unread, as a timeout does, makes the engine give it up."""
        deadline = time.monotonic() + task.build_timeout_sec
        output = collections.deque(maxlen=20)
        events = self.engine.client.api.build(
            fileobj=io.BytesIO(context),
            custom_context=True,
            tag=name,
            rm=True,
            forcerm=True,
            decode=True,
            network_mode=None if self._network else 'none',
            labels=self.engine.labels() | {'echo_jax.task': task.task_id},
            timeout=task.build_timeout_sec,  # of silence
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
    """Without those that lie in another; `/` is never one."""
    paths = {channels.absolute(path) for path in paths} - {'/'}
    inside = {path for path in paths if any(path.startswith(f'{other}/') for other in paths)}
    return tuple(sorted(paths - inside))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _fingerprint(context: bytes) -> str:
    """Of names, modes, links and contents; when and by whom they were written does not matter."""
    lines = []
    with tarfile.open(fileobj=io.BytesIO(context)) as tar:
        for member in tar:
            content = _hash(tar.extractfile(member).read()) if member.isfile() else ''
            lines.append(repr((member.name, member.mode, member.type, member.linkname, content)))
    return _hash('\n'.join(lines).encode())


def _context_of(recipe: str) -> bytes:
    """A build context of nothing but a Dockerfile."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        member = tarfile.TarInfo('Dockerfile')
        member.size = len(recipe.encode())
        tar.addfile(member, io.BytesIO(recipe.encode()))
    return buffer.getvalue()
