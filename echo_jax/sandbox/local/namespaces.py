"""The command line that opens a local sandbox: namespaces, its root, and its process 1.

Bubblewrap or util-linux `unshare` makes the namespaces; a bash script as process 1 finishes the
root and then serves the host (`local.py` speaks to it). No state here, and no asyncio.

Process 1 keeps the capabilities of its user namespace, so that the agent's processes, which have
none, can neither trace it nor open its descriptors; as process 1 it is also safe from `kill -9 -1`.
The agent's shell runs in a mount namespace of its own, where `/` is read-only. What process 1
mounts appears there too, which is how an upload makes a new directory under `/`.

Process 1 ends, and the kernel with it everything inside, when its requests end: so a host process
that is killed leaves nothing. (`bwrap --die-with-parent` would: killed while it starts, it forgets
a child that waits for it forever.)
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

from echo_jax.sandbox import SandboxError, channels

BACKENDS = ('bubblewrap', 'unshare')
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
# All that process 1 sees of an environment; the agent's shell inherits it.
ENVIRONMENT = {'PATH': PATH, 'HOME': '/root', 'USER': 'agent', 'LANG': 'C.UTF-8', 'TERM': 'dumb'}
UID = 1000  # inside; not 0, since a root without capabilities confuses tar and its like
_DEVICES = ('null', 'zero', 'full', 'random', 'urandom')
_WRITABLE = ('/app', '/logs', '/tmp', '/root', '/dev/shm')
_DIRECTORIES = (
    *('/etc', '/etc/ssl', '/dev', '/app', '/root', '/run', '/var', '/var/log'),
    *('/logs', '/logs/agent', '/logs/verifier', '/logs/artifacts'),
)
_SHARED = ('/tmp', '/dev/shm')  # mode 1777
_LINKS = {
    '/var/tmp': '/tmp',
    '/dev/fd': '/proc/self/fd',
    '/dev/stdin': '/proc/self/fd/0',
    '/dev/stdout': '/proc/self/fd/1',
    '/dev/stderr': '/proc/self/fd/2',
}
_ETC = (
    *('alternatives', 'debian_version', 'ld.so.cache', 'ld.so.conf', 'ld.so.conf.d', 'localtime'),
    *('magic', 'mime.types', 'nsswitch.conf', 'os-release', 'perl', 'protocols', 'python3'),
    *('python3.*', 'services', 'ssl/certs', 'ssl/openssl.cnf', 'terminfo'),
)
# Where host uids of sandboxes begin when the host process is root: each sandbox gets its own, so
# that limits which the kernel counts by uid are not shared. Far above any account's.
_FIRST_HOST_UID = 0x70000000
_counter = itertools.count()


class Limits(NamedTuple):
    """What one sandbox may use. Memory is bounded per process; disk is memory too (tmpfs).

    The worst case of a machine is sandboxes * (processes * memory_mb + disk_mb). It cannot be
    promised away without cgroups, so the sandbox's processes are also marked as the first that an
    out-of-memory kernel kills.
    """

    processes: int
    memory_mb: int  # RLIMIT_AS of each process
    disk_mb: int  # everything writable together; also the largest file
    files: int  # inodes, everything writable together
    cpu_seconds: int  # RLIMIT_CPU of each process
    open_files: int


# Common to both backends. S, T, O: descriptors of the shell's script, status and stdout; 2 is its
# stderr. Requests come on 0, replies go to 1. `put` and `get` see the sandbox's paths only.
_PROCESS_1 = r"""
die() { echo "$1" >&2; exit 1; }
umask 022
mount --make-rshared -t tmpfs -o "remount,mode=0755,size=$SIZE,nr_inodes=$INODES" tmpfs / ||
  die 'no tmpfs'
printf 'root:x:0:0::/:/bin/sh\nagent:x:%s:%s::/root:/bin/bash\n' $ID $ID >/etc/passwd
printf 'root:x:0:\nagent:x:%s:\n' $ID >/etc/group
printf '127.0.0.1 localhost sandbox\n::1 localhost\n' >/etc/hosts
printf 'sandbox\n' >/etc/hostname
{ echo 0 >/proc/sys/user/max_user_namespaces; } 2>/dev/null || die 'cannot forbid namespaces'
for d in $WRITABLE; do echo "$d $d none bind,nosuid,nodev"; done >/etc/fstab
mount -a -T /etc/fstab && : >/etc/fstab || die 'cannot mount'
export -n S T O SHELL_STAGE
unset SCRIPT WRITABLE SIZE INODES ID OLDPWD
exec 9>&2 2>/dev/null
place() {
  local top=${path#/}
  top=/${top%%/*}
  [[ -e $top ]] || { mkdir $top && mount --bind $top $top; }
}
set -m
shell=
echo ready
while IFS=' ' read -r request size escaped; do
  printf -v path %b "$escaped"
  case $request in
    shell)
      (
        export SHLVL=0
        exec <&$S >&$T 8>&$O
        eval "exec $S<&- $T>&- $O>&-"
        exec unshare --mount --propagation slave -- bash -c "$SHELL_STAGE" shell
      ) &
      shell=$! ;;
    wait) wait $shell; echo $? ;;
    kill)
      while kill -9 -1; do read -r -t .001 -N 65536 -u $S; done
      while read -t 0 -u $S && read -r -t .01 -N 65536 -u $S; do :; done
      wait; echo done ;;
TRANSFERS
  esac
done
""".replace('TRANSFERS', channels.TRANSFERS)

# The last steps to the agent's shell; bash for `ulimit -u`.
_SHELL_STAGE = """
mount -o remount,bind,ro / || exit
ulimit -c 0; ulimit -f {blocks}; ulimit -n {open_files}; ulimit -t {cpu_seconds}
ulimit -v {kilobytes}; ulimit -u {processes}
exec setpriv --no-new-privs --bounding-set -all --ambient-caps -all --inh-caps -all -- \
  bash --norc --noprofile -s
"""

# unshare's own part: a root on tmpfs, laid over /tmp in the private mount namespace.
_ROOT = r"""
die() { echo "$1" >&2; exit 1; }
mount -t tmpfs -o mode=0755 tmpfs /tmp && cd /tmp || die 'cannot mount a tmpfs'
base64 -d <<<%(skeleton)s | tar -xpf - || die 'cannot make the root'
printf '%%s\n' %(fstab)s >etc/fstab  # mount reads regular files only
mount -a -T etc/fstab || die 'cannot mount the root'
pivot_root . old && cd / && umount -l /old && rmdir /old || die 'cannot change the root'
{ hostname sandbox; ip link set lo up; } 2>/dev/null
"""


def command(
    backend: str, limits: Limits, descriptors: tuple[int, int, int]
) -> tuple[list[str], dict[str, str]]:
    """argv and environment of a sandbox whose shell uses `descriptors`: script, status, stdout.

    The script travels in the environment, which the agent cannot read, and not in the command
    line, which `ps` shows. No variable of the host does, but the PATH that finds the tools.
    """
    stage = _SHELL_STAGE.format(
        blocks=limits.disk_mb * 1024,
        kilobytes=limits.memory_mb * 1024,
        open_files=limits.open_files,
        cpu_seconds=limits.cpu_seconds,
        processes=limits.processes,
    )
    make, root = (_bubblewrap, '') if backend == 'bubblewrap' else (_unshare, _root())
    environment = {
        **ENVIRONMENT,
        'PATH': os.environ.get('PATH', PATH),
        'SCRIPT': f'export PATH={PATH}\n{root}{_PROCESS_1}',
        'SHELL_STAGE': stage,
        'SIZE': f'{limits.disk_mb}m',
        'INODES': str(limits.files),
        'ID': str(UID),
        'WRITABLE': ' '.join(_WRITABLE),
        **dict(zip('STO', map(str, descriptors), strict=True)),
    }
    shell = ['bash', '--norc', '--noprofile', '-c', 'eval "$SCRIPT"', 'init']
    return [*_drop_root(), *make(), *shell], environment


def _drop_root() -> list[str]:
    """The namespaces' owner must not be host root: /proc/sys and much else belongs to uid 0."""
    if os.geteuid() != 0:
        return []
    uid = str(_FIRST_HOST_UID + os.getpid() % 4096 * 4096 + next(_counter) % 4096)
    return ['setpriv', '--reuid', uid, '--regid', uid, '--clear-groups', '--']


def _bubblewrap() -> list[str]:
    directories, links = _system()
    arguments = [
        'bwrap',
        '--unshare-user',
        '--uid',
        str(UID),
        '--gid',
        str(UID),
        '--cap-add',
        'ALL',
    ]
    arguments += ['--unshare-pid', '--as-pid-1', '--unshare-net', '--unshare-ipc', '--unshare-uts']
    arguments += ['--unshare-cgroup-try', '--hostname', 'sandbox']
    arguments += ['--tmpfs', '/', '--proc', '/proc']
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
    arguments = ['unshare', '--user', f'--map-user={UID}', f'--map-group={UID}', '--keep-caps']
    arguments += ['--mount', '--pid', '--fork', '--net', '--ipc', '--uts', '--cgroup', '--']
    return arguments


@functools.cache
def _root() -> str:
    """The script that builds the root for `unshare`, which has nothing like bwrap's options."""
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
    skeleton = base64.b64encode(buffer.getvalue()).decode()
    return _ROOT % {'skeleton': skeleton, 'fstab': shlex.join(fstab)}


def _member(path: str, **attributes: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo('.' + path)
    for name, value in attributes.items():
        setattr(member, name, value)
    return member


@functools.cache
def _system() -> tuple[list[str], dict[str, str]]:
    """The host's system directories to bind, and those at `/` that are links (merged /usr)."""
    paths = [p for p in map(str, sorted(pathlib.Path('/').glob('lib*'))) if os.path.isdir(p)]
    paths = ['/usr', '/bin', '/sbin', *paths]
    links = {path: os.readlink(path) for path in paths if os.path.islink(path)}
    return [path for path in paths if os.path.isdir(path) and path not in links], links


@functools.cache
def _etc() -> tuple[str, ...]:
    """What of the host's /etc a shell, a linker, a locale or TLS needs; no accounts, no secrets."""
    found = sorted({path for name in _ETC for path in pathlib.Path('/etc').glob(name)})
    return tuple(str(path) for path in found if os.access(path, os.R_OK))


def check(backend: str = 'auto') -> str:
    """The backend that works here: 'bubblewrap' or 'unshare'. Opens and closes one to know.

    Raises SandboxError with one line that says what to install or to allow.
    """
    if backend not in ('auto', *BACKENDS):
        raise ValueError(f"backend {backend!r}: want 'auto', {' or '.join(map(repr, BACKENDS))}")
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
    """Why `backend` does not work, in one line; None where it does."""
    limits = Limits(64, 256, 16, 1000, 60, 64)
    arguments, environment = command(backend, limits, (0, 1, 2))
    for tool in ('bwrap' if backend == 'bubblewrap' else 'unshare', 'setpriv', 'mount', 'bash'):
        if shutil.which(tool) is None:
            return f'{tool} is not installed'
    done = subprocess.run(
        arguments,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment,
        timeout=30,
        check=False,
    )
    if done.stdout == b'ready\n':
        return None
    lines = done.stderr.decode(errors='replace').split('\n')
    return '; '.join(line for line in lines if line) or f'exit code {done.returncode}'
