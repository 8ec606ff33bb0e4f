"""What passes between host and sandbox: pipes, signed reports, archives, lines for bash.

Knows nothing of namespaces, engines or when shells begin and end; see the backends and `shell.py`.
"""

import array
import asyncio
import contextlib
import fcntl
import io
import os
import pathlib
import socket
import struct
import tarfile
import termios
from collections.abc import Collection

# A sandbox ends when these descriptors are closed. A fork of this process (such as a
# worker of multiprocessing) has copies of them and would keep the sandboxes alive; it closes them.
not_for_forks: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(number) for number in not_for_forks])
EMPTY_ARCHIVE = bytes(10240)  # a tar archive of nothing


def quote(text: str) -> str:
    """`text` as one bash word on one line, which shlex.quote would not make of a newline."""
    text = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
    escaped = text.replace('\\', '\\\\').replace("'", "\\'").replace('\n', '\\n')
    return f"$'{escaped}'"


def escape(path: str) -> str:
    """`path` for bash's `printf %b`. A path may hold spaces and newlines, but a request is one line
    of words.
    """
    safe = set(b'/._-') | set(range(48, 58)) | set(range(65, 91)) | set(range(97, 123))
    return ''.join(chr(b) if b in safe else f'\\0{b:03o}' for b in os.fsencode(path))


def absolute(path: str) -> str:
    """`path` without `.`, `..` and doubled slashes. ValueError if it is not absolute."""
    if not path.startswith('/') or '\0' in path:
        raise ValueError(f'{path!r}: expected an absolute path inside the sandbox')
    return '/' + os.path.normpath(path).lstrip('/')


def archive(
    path: pathlib.Path,
    name: str,
    *,
    keep_modes: bool = False,
    programs: Collection[str] = (),
    only: Collection[str] | None = None,
) -> bytes:
    """`path` as a tar archive under `name`; all in it is root's.

    Modes are kept. Unless `keep_modes`, the owner, who may not be root inside, can besides read and
    write all and enter directories. The files named in `programs`, relative to `path`, can be
    executed by all. If `only` is given, what it does not name is left out.

    Raises ValueError for a link that leads outside `path`, or for a device, socket or FIFO.
    """
    root = path.resolve(strict=True)
    if path.is_symlink() and not path.is_dir():
        path = root

    def admit(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        relative = os.path.relpath(member.name, name) if member.name != name else '.'
        if only is not None and relative != '.' and relative not in only:
            return None
        if not keep_modes:
            member.mode |= 0o700 if member.isdir() else 0o600
        if relative in programs:
            member.mode |= 0o111
        member.uid, member.gid, member.uname, member.gname = 0, 0, '', ''
        if member.issym():
            place = root / os.path.dirname(relative)
            if not (place / member.linkname).resolve().is_relative_to(root):
                raise ValueError(f'{path}: the link {member.name} leads outside, {member.linkname}')
        elif not (member.isfile() or member.isdir() or member.islnk()):
            raise ValueError(f'{path}: {member.name} is neither a file nor a directory nor a link')
        return member

    buffer = io.BytesIO()
    # BuildKit takes an archive that begins with a PAX header for a Dockerfile.
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.GNU_FORMAT) as tar:
        tar.add(path if not path.is_symlink() else root, name, filter=admit)
    return buffer.getvalue()


def packed(
    path: pathlib.Path, target: str, *, keep_modes: bool = False, programs: Collection[str] = ()
) -> tuple[str, bytes]:
    """(directory, tar archive to unpack there) so that a file, or the content of a directory, comes
    to lie at `target`. Raises ValueError for a link that leads outside `path`.
    """
    target = absolute(target)
    directory = target if path.is_dir() else os.path.dirname(target)
    name = '.' if path.is_dir() else os.path.basename(target)
    return directory, archive(path, name, keep_modes=keep_modes, programs=programs)


def pipe(reads: contextlib.ExitStack, writes: contextlib.ExitStack) -> tuple[int, int]:
    """(read end, write end), each of which the stack of its side closes."""
    reader, writer = os.pipe()
    try:
        return _high(reader, reads), _high(writer, writes)
    finally:
        os.close(reader)
        os.close(writer)


def status_pair(
    mine: contextlib.ExitStack, others: contextlib.ExitStack
) -> tuple[socket.socket, int]:
    """(our end, the sandbox's end), each of which the stack of its side closes. To each message the
    kernel adds the sender's process id, as the host numbers it, so that nobody can send in
    another's name.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.callback(ours.close)
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        ours.setblocking(False)
        return ours, _high(theirs.fileno(), others)


def _high(descriptor: int, closer: contextlib.ExitStack) -> int:
    """A copy with a number above those that bash scripts redirect by hand."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 64)
    closer.callback(os.close, high)
    return high


_CREDENTIALS = struct.Struct('3i')  # struct ucred: pid, uid, gid


def receive_now(sock: socket.socket) -> tuple[bytes, int]:
    """(message, the sender's process id on the host, or 0 if there was no sender)."""
    message, ancillary, _, _ = sock.recvmsg(1 << 18, socket.CMSG_SPACE(_CREDENTIALS.size))
    return message, _CREDENTIALS.unpack(ancillary[0][2])[0] if ancillary else 0


async def receive(sock: socket.socket) -> tuple[bytes, int]:
    """Waits for a message, and returns it as `receive_now` does."""
    while True:
        try:
            return receive_now(sock)
        except BlockingIOError:
            await ready(sock.fileno())


async def receive_line(sock: socket.socket) -> str:
    """The text up to a newline, without it. EOFError if the sender is gone."""
    parts = [b'']
    while not parts[-1].endswith(b'\n'):
        message, _ = await receive(sock)
        if not message:
            raise EOFError
        parts.append(message)
    return b''.join(parts).decode().rstrip('\n')


def discard(sock: socket.socket) -> None:
    """Reads away what has come."""
    with contextlib.suppress(BlockingIOError):
        while receive_now(sock)[0]:
            pass


async def ready(descriptor: int, write: bool = False) -> None:
    """Returns when `descriptor` can be read, or written."""
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    if write:
        loop.add_writer(descriptor, wake)
    else:
        loop.add_reader(descriptor, wake)
    try:
        await waiter
    finally:
        if write:
            loop.remove_writer(descriptor)
        else:
            loop.remove_reader(descriptor)


async def write(descriptor: int, data: bytes) -> None:
    """Writes all of `data` to a descriptor that does not block."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            await ready(descriptor, write=True)


def available(descriptor: int) -> bytes:
    """What lies in the pipe now, and no more, since a writer may never stop."""
    count = array.array('i', [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return os.read(descriptor, count[0]) if count[0] else b''


# The lines below are built here and do not lie in scripts/, because the agent's shell reads them as
# its input: it has no arguments or variables to spare for us, since the agent could see and change
# them. All that is put into the text is a number or is quoted.


def first_line(nonce: str, cwd: str, workdir: str, env: dict[str, str]) -> str:
    """Makes a new shell ready and has it report.

    `cwd`, quoted for bash, is the directory to begin in; if it is empty or gone, `workdir` is.
    """
    home = quote(workdir)
    exports = ''.join(f'export {name}={quote(value)};' for name, value in env.items())
    return f'cd -- {cwd or home} || cd -- {home};unset OLDPWD;{exports}{report(nonce)}\n'


def command_lines(command: str, last_exit: int, nonce: str, then: str = '') -> bytes:
    """Makes the shell run `command` and report; `then` is put behind that on the last line.

    After a syntax error bash does not recognise a keyword as the next word; the first line uses
    that up. The second sets bash's line counter, so that messages count the command's own lines, as
    in `bash -c`; an assignment inside a redirection is the only one that bash does not undo. Then
    the last exit code is put back into `$?`. Descriptors 8 and 9 are the real streams; bash moves
    its own copies out of its children's sight.
    """
    status = f'(exit {last_exit});' if last_exit else ''
    return (
        ':\n{ :; } 2>&$((2+0*(LINENO=0)))\n'
        f'{status}eval {quote(command)} </dev/null >&8 2>&9 8>&- 9>&-;{report(nonce)}{then}\n'
    ).encode()


def report(nonce: str) -> str:
    """Prints `nonce`, the exit code of what ran before, and the current directory, quoted."""
    return f"""builtin printf '%s %d %q\\n' {nonce} "$?" "${{PWD:0:500}}\""""
