"""The command line that opens a local sandbox: namespaces, its root, and its process 1.

Bubblewrap or util-linux's `unshare` makes the namespaces. Process 1, a bash that runs
scripts/local_init.sh, finishes the root and then serves the host's requests, which `sandbox.py`
sends. No state and no asyncio here.

Process 1 keeps the capabilities of its user namespace, so that the agent's processes, which have
none, can neither trace it nor open its descriptors; as process 1 it is also safe from `kill -9 -1`.
The agent's shell runs in a mount namespace of its own, where `/` is read-only. What process 1
mounts appears there too, which is how an upload makes a new directory under `/`.

Process 1 ends, and the kernel ends everything inside with it, when its requests end: so a host
process that is killed leaves nothing. (`bwrap --die-with-parent` does leave something: if it is
killed while it starts, it forgets a child that waits for it forever.)
"""

import base64
import functools
import io
import itertools
import os
import pathlib
import shlex
import shutil
import subprocess
import tarfile
from typing import NamedTuple

from echo_jax.sandbox import ENVIRONMENT, PATH, UID, SandboxError, read_script

BACKENDS = ('bubblewrap', 'unshare')
CHECK_SEC = 30.0  # for what takes milliseconds, on a machine that may be overloaded
_DEVICES = ('null', 'zero', 'full', 'random', 'urandom')
_WRITABLE = ('/app', '/logs', '/tmp', '/root', '/dev/shm')
_DIRECTORIES = shlex.split(
    '/etc /etc/ssl /dev /app /root /run /var /var/log '
    '/logs /logs/agent /logs/verifier /logs/artifacts'
)
_SHARED = ('/tmp', '/dev/shm')  # mode 1777
_LINKS = {
    '/var/tmp': '/tmp',
    '/dev/fd': '/proc/self/fd',
    '/dev/stdin': '/proc/self/fd/0',
    '/dev/stdout': '/proc/self/fd/1',
    '/dev/stderr': '/proc/self/fd/2',
}
# What a shell, a linker, a locale or TLS needs of the host's /etc: no accounts and no secrets.
_ETC = shlex.split(
    'alternatives debian_version ld.so.cache ld.so.conf ld.so.conf.d localtime magic mime.types '
    'nsswitch.conf os-release perl protocols python3 python3.* services ssl/certs ssl/openssl.cnf '
    'terminfo'
)
# If the host process is root, the sandboxes' uids on the host begin here. Each sandbox gets its
# own, so that limits which the kernel counts by uid are not shared. Far above any account's.
_FIRST_HOST_UID = 0x70000000
_counter = itertools.count()


class Limits(NamedTuple):
    """What one sandbox may use. Memory is bounded per process; disk is memory too (tmpfs).

    The worst case of a machine is sandboxes * (processes * memory_mb + disk_mb). Only cgroups could
    bound that, so the sandbox's processes are also marked as the first that a kernel without memory
    kills.
    """

    memory_mb: int  # RLIMIT_AS of each process
    processes: int = 256
    disk_mb: int = 256  # everything writable together; also the largest file
    files: int = 65_536  # inodes, everything writable together
    cpu_seconds: int = 3_600  # RLIMIT_CPU of each process
    open_files: int = 1_024


def command(
    backend: str, limits: Limits, descriptors: tuple[int, int, int]
) -> tuple[list[str], dict[str, str]]:
    """argv and environment of a sandbox whose shell uses `descriptors`: script, status, stdout.

    The script travels in the environment, which the agent cannot read, and not in the command line,
    which `ps` shows. No variable of the host's goes inside, except for the PATH that finds the
    tools.
    """
    of_shell = (
        limits.disk_mb * 1024,
        limits.open_files,
        limits.cpu_seconds,
        limits.memory_mb * 1024,
        limits.processes,
    )
    script, status, stdout = descriptors
    environment = {
        **ENVIRONMENT,
        'PATH': os.environ.get('PATH', PATH),
        'INSIDE_PATH': PATH,
        'SCRIPT': read_script('put') + read_script('local_init'),
        'LIMITS': ' '.join(map(str, of_shell)),
        'SIZE': f'{limits.disk_mb}m',
        'INODES': str(limits.files),
        'ID': str(UID),
        'WRITABLE': ' '.join(_WRITABLE),
        'S': str(script),
        'T': str(status),
        'O': str(stdout),
    }
    if backend == 'bubblewrap':
        make = _bubblewrap()
    else:
        make = _unshare()
        environment['SKELETON'], environment['FSTAB'] = _root()
    shell = ['bash', '--norc', '--noprofile', '-c', 'eval "$SCRIPT"', 'init']
    return [*_drop_root(), *make, *shell], environment


def _drop_root() -> list[str]:
    """The namespaces' owner must not be host root: /proc/sys and much else belongs to uid 0."""
    if os.geteuid() != 0:
        return []
    uid = str(_FIRST_HOST_UID + os.getpid() % 4096 * 4096 + next(_counter) % 4096)
    return ['setpriv', '--reuid', uid, '--regid', uid, '--clear-groups', '--']


def _bubblewrap() -> list[str]:
    directories, links = _system()
    arguments = shlex.split(
        f'bwrap --unshare-user --uid {UID} --gid {UID} --cap-add ALL '
        '--unshare-pid --as-pid-1 --unshare-net --unshare-ipc --unshare-uts '
        '--unshare-cgroup-try --hostname sandbox --tmpfs / --proc /proc'
    )
    for path in _DIRECTORIES:
        arguments += ['--perms', '0755', '--dir', path]
    for path in _SHARED:
        arguments += ['--perms', '1777', '--dir', path]
    for path in (*directories, *_etc()):
        arguments += ['--ro-bind', path, path]
    for link, target in (*links.items(), *_LINKS.items()):
        arguments += ['--symlink', target, link]
    for name in _DEVICES:
        arguments += ['--dev-bind', f'/dev/{name}', f'/dev/{name}']
    return [*arguments, '--']


def _unshare() -> list[str]:
    return shlex.split(
        f'unshare --user --map-user={UID} --map-group={UID} --keep-caps '
        '--mount --pid --fork --net --ipc --uts --cgroup --'
    )


@functools.cache
def _root() -> tuple[str, str]:
    """SKELETON and FSTAB of local_init.sh: what bwrap has options for and `unshare` has not."""
    directories, links = _system()
    binds = (*directories, *_etc())
    folders = {path for path in binds if os.path.isdir(path)}
    devices = [f'/dev/{name}' for name in _DEVICES]
    files = [path for path in binds if path not in folders] + devices
    parents = {os.path.dirname(path) for path in files}
    # nosuid and nodev may be locked on the host's mounts, so they are asked for again.
    fstab = [f'{path} /tmp{path} none rbind,ro,nosuid,nodev' for path in binds]
    fstab += [f'{path} /tmp{path} none bind' for path in devices]
    fstab.append('proc /tmp/proc proc nosuid,nodev,noexec')
    modes = dict.fromkeys((*_DIRECTORIES, *folders, *parents, '/old', '/proc'), 0o755)
    modes |= dict.fromkeys(_SHARED, 0o1777)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for path, mode in sorted(modes.items()):
            tar.addfile(_member(path, type=tarfile.DIRTYPE, mode=mode))
        for path in files:
            tar.addfile(_member(path))
        for path, target in (*links.items(), *_LINKS.items()):
            tar.addfile(_member(path, type=tarfile.SYMTYPE, linkname=target))
    return base64.b64encode(buffer.getvalue()).decode(), '\n'.join(fstab)


def _member(
    path: str, type: bytes = tarfile.REGTYPE, mode: int = 0o644, linkname: str = ''
) -> tarfile.TarInfo:
    member = tarfile.TarInfo('.' + path)
    member.type, member.mode, member.linkname = type, mode, linkname
    return member


@functools.cache
def _system() -> tuple[list[str], dict[str, str]]:
    """The host's system directories to bind, and those at `/` that are links (merged /usr)."""
    paths = [p for p in map(str, sorted(pathlib.Path('/').glob('lib*'))) if os.path.isdir(p)]
    paths = ['/usr', '/bin', '/sbin', *paths]
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)}
    return [path for path in paths if os.path.isdir(path) and path not in links], links


def links() -> dict[str, str]:
    """The links in a sandbox to other directories, by their paths: /bin on a merged system."""
    return _system()[1] | {'/var/tmp': _LINKS['/var/tmp']}


@functools.cache
def _etc() -> tuple[str, ...]:
    """The paths of `_ETC` that are on this host and that everybody may read."""
    found = sorted({path for name in _ETC for path in pathlib.Path('/etc').glob(name)})
    return tuple(str(path) for path in found if os.access(path, os.R_OK))


def check(backend: str = 'auto') -> str:
    """The backend that works here: 'bubblewrap' or 'unshare'. Opens and closes a sandbox to know.

    Raises SandboxError with one line that says what to install or to allow.
    """
    if backend not in ('auto', *BACKENDS):
        raise ValueError(f"backend is {backend!r}; expected 'auto', 'bubblewrap' or 'unshare'")
    reasons = []
    for name in BACKENDS if backend == 'auto' else (backend,):
        reason = _attempt(name)
        if reason is None:
            return name
        reasons.append(f'{name}: {reason}')
    raise SandboxError(
        f'no local sandbox ({"; ".join(reasons)}): install bubblewrap and allow user namespaces '
        '(sysctl kernel.unprivileged_userns_clone=1, '
        'kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces above 0)'
    )


def _attempt(backend: str) -> str | None:
    """Why `backend` does not work, in one line; None if it does."""
    limits = Limits(256, processes=64, disk_mb=16, files=1000, cpu_seconds=60, open_files=64)
    arguments, environment = command(backend, limits, (0, 1, 2))
    for tool in ('bwrap' if backend == 'bubblewrap' else 'unshare', 'setpriv', 'mount', 'bash'):
        if shutil.which(tool) is None:
            return f'{tool} is not installed'
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=CHECK_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f'it did not answer in {CHECK_SEC:g} s'
    except OSError as error:  # no room for a process
        return str(error)
    if done.stdout == b'ready\n':
        return None
    lines = done.stderr.decode(errors='replace').split('\n')
    return '; '.join(line for line in lines if line) or f'exit code {done.returncode}'
