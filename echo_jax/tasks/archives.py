"""A task directory as the bytes of a tar, and back out of a tar that nobody vouches for.

Knows no parquet and no task: paths, kinds and sizes only. Files are written by hand and not by
tarfile's 'data' filter, which takes a leading `/` and a setuid bit off in silence, bounds neither
bytes nor members, and let long chains of links out until Python 3.11.13 (CVE-2025-4517).
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
_MAX_NAME = 1024  # bytes; so that realpath never meets a path that is too long for it
_MAX_PART = 255  # bytes between two slashes, as file systems have it
_MAGIC = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\0': lzma.open}
# The last two: what tarfile raises for a size that no file has, and for headers of headers.
_DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError),
    *(OverflowError, RecursionError),
)


def pack(directory: pathlib.Path) -> bytes:
    """The directory's content as a plain tar: the same files give the same bytes, wherever.

    Raises ValueError for what `unpack` would refuse.
    """

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ''
        if not member.mode & 0o6000 or member.isdir():  # else left for `_check` to refuse
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
    """Writes the archive's files into `directory`, which is empty; one leading folder is left out.

    `data` is a tar, plain or packed by gzip, bzip2 or xz. Owners and times are not kept; of the
    mode, only whether the owner may run a file; hard links become copies. Raises ValueError, which
    names the member, before anything is written for: absolute names, `..`, names that are no UTF-8
    or too long, a name that comes twice or lies under what is no directory, links that lead
    outside, devices, FIFOs, setuid and setgid files, more than MAX_BYTES or MAX_MEMBERS, damage. A
    link that leads outside by way of other links is found last, when the files are there.
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
                except OSError as error:  # what gzip and bz2 say of damage
                    raise tarfile.ReadError(str(error)) from error
            break
    if len(data) > MAX_BYTES:
        raise ValueError(f'the archive unpacks to over {MAX_BYTES >> 20} MiB; make it smaller')
    return data


def _check(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """What goes to which path below the directory; a hard link stands as the file it links to."""
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
                raise ValueError(f'{member.name!r} stands where the task directory should')
            continue
        name = name.removeprefix(f'{lead}/')
        parents = [str(parent) for parent in pathlib.PurePosixPath(name).parents]
        if under := next((p for p in parents if p in checked and not checked[p].isdir()), None):
            raise ValueError(f'{name!r} lies under {under!r}, which is no directory')
        both_folders = member.isdir() and checked.get(name, member).isdir()
        if (name in checked or name in folders) and not both_folders:
            raise ValueError(f'{name!r} comes twice')
        folders.update(parents)
        if len(folders) > MAX_MEMBERS:  # those that are only named on the way to a file
            raise ValueError(f'{name!r} takes the folders over {MAX_MEMBERS}; make it smaller')
        checked[name] = _checked(name, member, checked, lead)
        total += checked[name].size
        if total > MAX_BYTES:
            raise ValueError(
                f'{name!r} takes the files over {MAX_BYTES >> 20} MiB; make it smaller'
            )
    return checked


def _name(name: str) -> str:
    """The member's name, normalized; ValueError where it is none to write to."""
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
    """The folder that all lies in, where that is not the task directory itself; else ''."""
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
        path.write_bytes(tar.extractfile(member).read())
        path.chmod(0o755 if member.mode & 0o100 else 0o644)
