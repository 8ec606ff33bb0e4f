"""What passes between host and sandbox: pipes, signed reports, archives, lines for bash.

Knows nothing of namespaces, engines or shells' lives; see `local.py` and `docker.py`.
"""

import array
import asyncio
import binascii
import contextlib
import fcntl
import io
import os
import pathlib
import socket
import struct
import tarfile
import termios

# A forked worker of this process must not keep its sandboxes alive (see `namespaces.py`).
not_for_forks: set[int] = set()
os.register_at_fork(after_in_child=lambda: [os.close(number) for number in not_for_forks])
EMPTY_ARCHIVE = bytes(10240)  # a tar archive of nothing
# How process 1, a bash, answers `put` and `get`: cases of its `case $request`, where size and path
# are the request's. `place` is a function of its own, which makes room for a top-level directory.
# Uploads are much of what a short episode costs, so what bash can do itself is no process.
TRANSFERS = r"""
    put)
      error=$(head -c $size | {
        place && {
          { cd -P -- "$path" && [[ $PWD == "$path" ]]; } 2>/dev/null || {
            [[ $(realpath -m -- "$path") == "$path" ]] ||
              { echo "a link lies on the way"; false; } &&
            mkdir -p -- "$path" && cd -- "$path"
          }
        } && tar -xpf - --no-same-owner
        status=$?; [[ $status == 0 ]] && ! read -r -N 1 || cat >/dev/null; exit $status
      } 2>&1) && echo done || echo "error ${error//$'\n'/; }" ;;
    get)
      if [[ -f $path && ! -L $path ]]; then
        printf 'file '
        dd if="$path" iflag=nonblock,nofollow,count_bytes count=$size bs=64K | base64 -w 0
        echo
      else echo missing; fi ;;
"""


def quote(text: str) -> str:
    """`text` as one bash word on one line."""
    text = text.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')
    escaped = text.replace('\\', '\\\\').replace("'", "\\'").replace('\n', '\\n')
    return f"$'{escaped}'"


def escape(path: str) -> str:
    """For `printf %b`: a path may hold spaces and newlines, a request is one line of words."""
    safe = set(b'/._-') | set(range(48, 58)) | set(range(65, 91)) | set(range(97, 123))
    return ''.join(chr(b) if b in safe else f'\\0{b:03o}' for b in os.fsencode(path))


def absolute(path: str) -> str:
    if not path.startswith('/') or '\0' in path:
        raise ValueError(f'{path!r}: want an absolute path inside the sandbox')
    return '/' + os.path.normpath(path).lstrip('/')


def archive(path: pathlib.Path, name: str) -> bytes:
    """`path` as a tar under `name`; its user may read all, write all, and enter directories."""
    root = path.resolve(strict=True)
    if path.is_symlink() and not path.is_dir():
        path = root

    def admit(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mode = member.mode & 0o755 | (0o755 if member.isdir() else 0o644)
        if member.issym():
            place = root / os.path.relpath(os.path.dirname(member.name) or '.', name)
            if not (place / member.linkname).resolve().is_relative_to(root):
                raise ValueError(f'{path}: the link {member.name} leads outside, {member.linkname}')
        elif not (member.isfile() or member.isdir() or member.islnk()):
            raise ValueError(f'{path}: {member.name} is no file, directory or link')
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        tar.add(path if not path.is_symlink() else root, name, filter=admit)
    return buffer.getvalue()


def packed(path: pathlib.Path, target: str) -> tuple[str, bytes]:
    """(directory, archive): unpacked there it is a file, or a directory's content, at `target`.

    Raises ValueError for a link that leads outside `path`.
    """
    path, target = pathlib.Path(path), absolute(target)
    directory = target if path.is_dir() else os.path.dirname(target)
    return directory, archive(path, '.' if path.is_dir() else os.path.basename(target))


def content(reply: str, path: str, limit: int) -> bytes:
    """What was asked for. FileNotFoundError where there is none, OSError where over `limit`."""
    kind, _, text = reply.partition(' ')
    if kind != 'file':
        raise FileNotFoundError(f'{path}: no regular file in the sandbox')
    found = binascii.a2b_base64(text)
    if len(found) > limit:
        raise OSError(f'{path}: longer than the {limit} bytes that are read from a sandbox')
    return found


def pipe() -> tuple[int, int]:
    """(read, write), numbered above what bash redirects by hand."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 64) for end in ends)
    for end in ends:
        os.close(end)
    return high


def status_pair() -> tuple[socket.socket, int]:
    """(ours, the sandbox's end). The kernel adds the sender's process id, as we number it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    high = fcntl.fcntl(theirs, fcntl.F_DUPFD_CLOEXEC, 64)
    theirs.close()
    return ours, high


_CREDENTIALS = struct.Struct('3i')  # struct ucred: pid, uid, gid


def receive_now(sock: socket.socket) -> tuple[bytes, int]:
    """(message, the sender's process id on the host, 0 where there was none)."""
    message, ancillary, _, _ = sock.recvmsg(1 << 18, socket.CMSG_SPACE(_CREDENTIALS.size))
    return message, _CREDENTIALS.unpack(ancillary[0][2])[0] if ancillary else 0


async def receive(sock: socket.socket) -> tuple[bytes, int]:
    while True:
        try:
            return receive_now(sock)
        except BlockingIOError:
            await ready(sock.fileno())


async def receive_line(sock: socket.socket) -> str:
    """What comes until a newline, without it. EOFError where the sender is gone."""
    parts = [b'']
    while not parts[-1].endswith(b'\n'):
        message, _ = await receive(sock)
        if not message:
            raise EOFError
        parts.append(message)
    return b''.join(parts).decode().rstrip('\n')


def discard(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while receive_now(sock)[0]:
            pass


async def ready(descriptor: int, write: bool = False) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    )
    add(descriptor, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        remove(descriptor)


async def write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            await ready(descriptor, write=True)


def available(descriptor: int) -> bytes:
    """What lies in the pipe now, and no more: a writer may never stop."""
    count = array.array('i', [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return os.read(descriptor, count[0]) if count[0] else b''


def script(command: str, last_exit: int, nonce: str, then: str = '') -> bytes:
    """The lines that make the shell run `command` and report; `then` more of the last line.

    After a syntax error bash takes the next word for no keyword; the first line uses that up. The
    second sets bash's line counter, so that messages count the command's own lines, as in
    `bash -c`; an assignment inside a redirection is the one that bash does not undo. Then the last
    exit code is put back into `$?`. Descriptors 8 and 9 are the real streams; bash moves its own
    out of children's sight.
    """
    status = f'(exit {last_exit});' if last_exit else ''
    return (
        ':\n{ :; } 2>&$((2+0*(LINENO=0)))\n'
        f'{status}eval {quote(command)} </dev/null >&8 2>&9 8>&- 9>&-;{report(nonce)}{then}\n'
    ).encode()


def report(nonce: str) -> str:
    return f"""builtin printf '%s %d %q\\n' {nonce} "$?" "${{PWD:0:500}}\""""
