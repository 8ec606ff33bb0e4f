"""Packs a task directory as a tar, and unpacks a tar that nobody vouches for.

Knows paths, kinds and sizes, but neither parquet nor tasks. Members are checked and written by hand
instead of by tarfile's 'data' filter, because that filter silently takes off a leading `/` and a
setuid bit, limits neither bytes nor members, and let long chains of links lead outside until
Python 3.11.13 (CVE-2025-4517).
"""

import bz2
import gzip
import io
import lzma
import os
import pathlib
import posixpath
import tarfile
import zlib

MAX_BYTES = 1 << 30  # of a whole archive, unpacked
MAX_MEMBERS = 20_000
_MAX_NAME = 1024  # bytes; keeps every path short enough for realpath
_MAX_PART = 255  # bytes between two slashes, the limit of file systems
_MAGIC = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    OverflowError,  # tarfile, for a size that no file has
    RecursionError,  # tarfile, for a long chain of extended headers
)


def pack(directory: pathlib.Path) -> bytes:
    """The directory's content as a plain tar; the same files give the same bytes everywhere.

    Raises ValueError for what `unpack` would refuse.
    """

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ''
        if not member.mode & 0o6000 or member.isdir():  # setuid files are kept for _check to refuse
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(directory.iterdir()):
            tar.add(path, path.name, filter=plain)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue()), mode='r:') as tar:
        _check(tar)
    return buffer.getvalue()


def unpack(data: bytes, directory: pathlib.Path) -> None:
    """Writes the archive's files into the empty `directory`, without a folder that holds them all.

    `data` is a tar, plain or compressed by gzip, bzip2 or xz. Owners and times are not kept; of the
    mode, only whether the owner may run a file; hard links become copies. Before anything is
    written, raises ValueError, which names the member, for: absolute names, `..`, names that are
    not UTF-8 or too long, a name that comes twice or lies under something that is not a directory,
    links that lead outside, devices, FIFOs, setuid and setgid files, more than MAX_BYTES or
    MAX_MEMBERS, and damage. Only a link that leads outside by way of other links is found after the
    files are written.
    """
    try:
        data = _decompress(data)
        with tarfile.open(fileobj=io.BytesIO(data), mode='r:') as tar:
            members = _check(tar)
            if data[tar.offset : tar.offset + tarfile.BLOCKSIZE].strip(b'\0'):
                raise ValueError(f'the archive is damaged after {len(members)} members')
            for name, member in members.items():
                _write(tar, member, directory / name)
    except _DAMAGE as error:
        raise ValueError(f'the archive is damaged or no tar ({error})') from error
    root = pathlib.Path(os.path.realpath(directory))
    for name, member in members.items():
        if member.issym() and not pathlib.Path(os.path.realpath(root / name)).is_relative_to(root):
            raise ValueError(f'{name!r} links outside by way of others, to {member.linkname!r}')


def _decompress(data: bytes) -> bytes:
    for magic, opener in _MAGIC.items():
        if data.startswith(magic):
            with opener(io.BytesIO(data)) as stream:
                try:
                    data = stream.read(MAX_BYTES + 1)
                except OSError as error:  # gzip and bz2 raise it for damaged data
                    raise tarfile.ReadError(str(error)) from error
            break
    if len(data) > MAX_BYTES:
        raise ValueError(f'the archive unpacks to over {MAX_BYTES >> 20} MiB; make it smaller')
    return data


def _check(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The members by their path below the directory; a hard link is the file that it links to.

    Raises ValueError for whatever `unpack` refuses before it writes.
    """
    named = []
    for member in tar:
        named.append((_name(member.name), member))
        if len(named) > MAX_MEMBERS:
            raise ValueError(f'the archive has over {MAX_MEMBERS} members; make it smaller')
    lead = _leading_folder([name for name, _ in named])
    checked: dict[str, tarfile.TarInfo] = {}
    folders, total = {'.'}, 0
    for name, member in named:
        if name in ('.', lead):
            if not member.isdir():
                raise ValueError(f'{member.name!r} stands in the place of the task directory')
            continue
        name = name.removeprefix(f'{lead}/')
        parents = [str(parent) for parent in pathlib.PurePosixPath(name).parents]
        for parent in parents:
            if parent in checked and not checked[parent].isdir():
                raise ValueError(f'{name!r} lies under {parent!r}, which is no directory')
        both_folders = member.isdir() and checked.get(name, member).isdir()
        if (name in checked or name in folders) and not both_folders:
            raise ValueError(f'{name!r} comes twice')
        folders.update(parents)
        if len(folders) > MAX_MEMBERS:  # they count even if only a file's name implies them
            raise ValueError(f'{name!r} takes the folders over {MAX_MEMBERS}; make it smaller')
        checked[name] = _checked(name, member, checked, lead)
        total += checked[name].size
        if total > MAX_BYTES:
            raise ValueError(
                f'{name!r} takes the files over {MAX_BYTES >> 20} MiB; make it smaller'
            )
    return checked


def _name(name: str) -> str:
    """The member's name, normalized; raises ValueError for a name that must not be written."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError(f'{name!r} is no UTF-8; rename it') from None
    parts = name.split('/')
    if name.startswith('/') or '..' in parts or '\0' in name or not name:
        raise ValueError(f'{name!r} leads outside the task directory; name it relative to that')
    if size > _MAX_NAME or max(len(part.encode()) for part in parts) > _MAX_PART:
        raise ValueError(f'{name[:60]!r}... is a name of {size} bytes; shorten it')
    return posixpath.normpath(name)


def _leading_folder(names: list[str]) -> str:
    """The one folder that everything lies in, '' if the archive itself is the task directory."""
    tops = {name.partition('/')[0] for name in names} - {'.'}
    inside = any('/' in name for name in names) and 'task.toml' not in names
    return tops.pop() if inside and len(tops) == 1 else ''


def _checked(
    name: str, member: tarfile.TarInfo, before: dict[str, tarfile.TarInfo], lead: str
) -> tarfile.TarInfo:
    """`member`, or for a hard link the file among `before` that it links to."""
    if member.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
        long = len(member.linkname.encode('utf-8', 'surrogateescape')) > _MAX_NAME
        empty = not member.linkname or '\0' in member.linkname
        if member.linkname.startswith('/') or target.split('/')[0] == '..' or long or empty:
            raise ValueError(f'{name!r} links outside the task directory, {member.linkname[:60]!r}')
        return member
    if member.islnk():
        target = posixpath.normpath(member.linkname).removeprefix(f'{lead}/' if lead else '')
        if target not in before or not before[target].isreg():
            raise ValueError(f'{name!r} is a hard link to {target[:60]!r}, no file before it')
        return before[target]
    if not (member.isreg() or member.isdir()) or member.size < 0:
        raise ValueError(f'{name!r} is no file, directory or link; leave it out')
    if member.isreg() and member.mode & 0o6000:
        raise ValueError(f'{name!r} has mode {member.mode:o}, setuid or setgid; take that off')
    return member


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        path.mkdir(exist_ok=True)
    elif member.issym():
        path.symlink_to(member.linkname)
    else:
        content = tar.extractfile(member)
        assert content is not None  # which it is for directories and links alone
        path.write_bytes(content.read())
        path.chmod(0o755 if member.mode & 0o100 else 0o644)
