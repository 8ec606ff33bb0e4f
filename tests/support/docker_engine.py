"""A Docker engine for tests: the one that answers, else one of our own, for root with `dockerd`.

Our own reaches no registry; its base image is made by mmdebstrap from Debian's packages and kept as
a tar in ECHO_TEST_CACHE (default: a folder of the system's temporary one). It has a bridge of its
own where `ip` and `iptables` are installed, since two engines must not share docker0.
"""

import contextlib
import fcntl
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import docker
import pytest

from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.docker.engine import FAILURES, Engine

BASE = 'debian:bookworm-slim'  # what generated tasks are made from


class Daemon:
    """An engine's address; `process` is ours to kill and start again, or None if it is not ours."""

    def __init__(self, url: str, folder: pathlib.Path | None = None):
        self.url, self.folder, self.process = url, folder, None
        self.bridge: str | None = None  # a network device that is ours

    def start(self) -> None:
        """Returns when it answers."""
        # A killed engine left them; if nobody reaps orphans, their process ids are still taken.
        for file in ('docker.pid', 'exec/containerd/containerd.pid'):
            (self.folder / file).unlink(missing_ok=True)
        with open(self.folder / 'log', 'ab') as log:
            self.process = subprocess.Popen(
                [
                    'dockerd',
                    f'--host={self.url}',
                    *self._network(),
                    f'--data-root={self.folder}/data',
                    f'--exec-root={self.folder}/exec',
                    f'--pidfile={self.folder}/docker.pid',
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while True:
            try:
                return Engine(self.url).close()
            except SandboxError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    tail = (self.folder / 'log').read_text(errors='replace').splitlines()[-3:]
                    raise RuntimeError(f'dockerd does not start: {"; ".join(tail)}') from None
                time.sleep(0.1)

    def _network(self) -> list[str]:
        if not (shutil.which('ip') and shutil.which('iptables')):
            return ['--bridge=none', '--iptables=false', '--ip6tables=false']
        if self.bridge is None:
            self.bridge = f'echo{os.getpid()}'
            # Of 198.18.0.0/15, which is for tests of networks.
            address = f'198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}.1/24'
            for words in (
                ['link', 'add', self.bridge, 'type', 'bridge'],
                ['addr', 'add', address, 'dev', self.bridge],
                ['link', 'set', self.bridge, 'up'],
            ):
                subprocess.run(['ip', *words], check=True)
        return [f'--bridge={self.bridge}']

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait()

    def stop(self) -> None:
        # An engine leaves the bridges of its networks to the host, which has room for thirty.
        bridges = [self.bridge] if self.bridge else []
        with (
            contextlib.suppress(SandboxError, *FAILURES),
            contextlib.closing(Engine(self.url)) as used,
        ):
            bridges += [f'br-{network.id[:12]}' for network in used.client.networks.list()]
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        for mount in pathlib.Path('/proc/self/mounts').read_text().splitlines():
            if str(self.folder) in mount.split()[1]:
                subprocess.run(['umount', '-l', mount.split()[1]], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        for bridge in bridges:
            subprocess.run(['ip', 'link', 'del', bridge], check=False, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def running():
    """A Daemon with BASE in it, or a skip that says why not."""
    url = os.environ.get('DOCKER_HOST', 'unix:///var/run/docker.sock')
    with contextlib.suppress(SandboxError):
        Engine(url).close()
        yield _with_base(Daemon(url))
        return
    if os.geteuid() != 0 or shutil.which('dockerd') is None:
        pytest.skip(f'no Docker engine at {url}, and dockerd cannot be started: want root and it')
    archive = base_archive()
    folder = pathlib.Path(tempfile.mkdtemp(prefix='echo-docker-'))  # short: a socket's path
    daemon = Daemon(f'unix://{folder}/docker.sock', folder)
    try:
        try:
            daemon.start()
        except RuntimeError as error:
            pytest.skip(str(error))
        yield _with_base(daemon, archive)
    finally:
        daemon.stop()


def _with_base(daemon: Daemon, archive: pathlib.Path | None = None) -> Daemon:
    client = docker.DockerClient(daemon.url, timeout=120)
    if not client.images.list(BASE):
        repository, tag = BASE.split(':')
        archive = archive or base_archive()
        client.api.import_image_from_file(str(archive), repository=repository, tag=tag)
    client.close()
    return daemon


def base_archive() -> pathlib.Path:
    """The root of a small Debian, as a tar."""
    default = pathlib.Path(tempfile.gettempdir()) / 'echo_jax_test_cache'
    cache = pathlib.Path(os.environ.get('ECHO_TEST_CACHE', default))
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / 'debian.tar'
    with open(cache / 'lock', 'w') as lock:  # one process makes it, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            _make_base(archive)
    return archive


def _make_base(archive: pathlib.Path) -> None:
    if shutil.which('mmdebstrap') is None:
        pytest.skip(f'no base image: mmdebstrap is not installed and {archive} is missing')
    partial = archive.with_suffix('.partial.tar')
    try:
        done = subprocess.run(
            ['mmdebstrap', '--quiet', '--variant=minbase', 'bookworm', partial],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f'mmdebstrap made no base image: {done.stderr.splitlines()[-1:]}')
        partial.rename(archive)
    finally:
        partial.unlink(missing_ok=True)
