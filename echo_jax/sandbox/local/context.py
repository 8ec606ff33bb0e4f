"""What a COPY takes from a task's environment/, as BuildKit does: .dockerignore, patterns, links.

Knows nothing of sandboxes: a copy becomes a tar archive that is to be unpacked at `/`.
"""

import io
import os
import pathlib
import posixpath
import re
import tarfile

from echo_jax.sandbox.local.dockerfile import Copy


class Context:
    """The files of environment/ that its .dockerignore leaves; ValueError if that is no UTF-8."""

    def __init__(self, root: pathlib.Path):
        self._root = root.resolve()
        rules = _read_ignore(self._root)
        self._paths: set[str] = set()  # relative; of files, links and directories
        for place, directories, files in os.walk(self._root):
            inside = os.path.relpath(place, self._root)
            for name in (*directories, *files):
                path = name if inside == '.' else f'{inside}/{name}'
                if not _is_ignored(path, rules):
                    # A directory is there for its files' sake even if it is ignored itself.
                    while path and path not in self._paths:
                        self._paths.add(path)
                        path = os.path.dirname(path)

    def find(self, copy: Copy) -> list[pathlib.Path]:
        """The files and directories that a COPY names; links are followed.

        Raises ValueError for what is not there, leads outside, or would have to be unpacked.
        """
        found = [path for source in copy.sources for path in self._matches(copy, source)]
        if copy.is_add and any(path.is_file() and tarfile.is_tarfile(path) for path in found):
            raise ValueError(
                f'{copy.where}: ADD of an archive, which it would unpack, is not followed by the '
                'local sandbox; COPY it and unpack it with RUN'
            )
        if len(found) > 1 and not copy.target.endswith('/'):
            raise ValueError(f'{copy.where}: several files need a target that ends in /')
        return found

    def _matches(self, copy: Copy, source: str) -> list[pathlib.Path]:
        name = posixpath.normpath(source.lstrip('/') or '.')
        if name.split('/')[0] == '..':
            raise ValueError(f'{copy.where}: {source} leads outside environment/')
        names = [name]
        if re.search(r'[*?[]', name):
            pattern = re.compile(_regex(re.sub(r'\*+', '*', name)), re.DOTALL)
            names = sorted(path for path in self._paths if pattern.fullmatch(path))
        paths = [(self._root / name).resolve() for name in names]
        for path in paths:
            if not path.is_relative_to(self._root):
                raise ValueError(f'{copy.where}: {source} leads outside environment/, to {path}')
            if path != self._root and str(path.relative_to(self._root)) not in self._paths:
                why = ', which .dockerignore leaves out' if path.exists() else ''
                raise ValueError(
                    f'{copy.where}: there is no such file in environment/: {source}{why}'
                )
        if not paths:
            raise ValueError(f'{copy.where}: nothing in environment/ matches {source}')
        return paths

    def archive(self, copy: Copy, into_directory: bool) -> bytes:
        """The tar archive of a copy; `into_directory` says whether its target is a directory.

        Of a directory the content is copied. Modes are kept, but the owner, who is not root in the
        sandbox, may read and write everything, as root could.
        """
        buffer = io.BytesIO()
        target = copy.target.strip('/')
        # This format has whole seconds: the other one has a header more for the rest of them.
        with tarfile.open(fileobj=buffer, mode='w', format=tarfile.GNU_FORMAT) as tar:
            for path in self.find(copy):
                if path.is_dir():
                    self._add_directory(tar, copy, path, target)
                else:
                    name = posixpath.join(target, path.name) if into_directory else target
                    self._add(tar, copy, path, name)
            for name, text in copy.texts:
                member = tarfile.TarInfo(posixpath.join(target, name) if into_directory else target)
                content = text.encode()
                member.size, member.mode = len(content), (copy.mode or 0o644) | 0o600
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    def _add_directory(
        self, tar: tarfile.TarFile, copy: Copy, directory: pathlib.Path, target: str
    ) -> None:
        base = '' if directory == self._root else f'{directory.relative_to(self._root)}/'
        if target:  # BuildKit makes it with this mode, whatever the source's or --chmod
            member = tarfile.TarInfo(target)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(member)
        for path in sorted(self._paths):  # a directory comes before what is in it
            if path.startswith(base):
                name = posixpath.join(target, path.removeprefix(base))
                self._add(tar, copy, self._root / path, name)

    def _add(self, tar: tarfile.TarFile, copy: Copy, path: pathlib.Path, name: str) -> None:
        member = tar.gettarinfo(path, name)
        if member is None or not (
            member.isreg() or member.isdir() or member.issym() or member.islnk()
        ):
            raise ValueError(f'{copy.where}: {path} is neither a file nor a directory nor a link')
        if member.issym() and not member.linkname.startswith('/'):
            end = posixpath.normpath(posixpath.join(path.parent, member.linkname))
            if not pathlib.PurePath(end).is_relative_to(self._root):
                raise ValueError(
                    f'{copy.where}: the link {path} leads outside environment/, {member.linkname}'
                )
        if not member.issym():
            mode = member.mode if copy.mode is None else copy.mode
            member.mode = mode | (0o700 if member.isdir() else 0o600)
        if member.isreg():
            with path.open('rb') as file:
                tar.addfile(member, file)
        else:
            tar.addfile(member)


def _read_ignore(root: pathlib.Path) -> list[tuple[re.Pattern, bool]]:
    """(pattern, whether it takes files back in) of each line of .dockerignore, if there is one."""
    for name in ('Dockerfile.dockerignore', '.dockerignore'):
        if (root / name).is_file():
            break
    else:
        return []
    try:
        text = (root / name).read_bytes().decode('utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{root / name} is not UTF-8 ({error}); save it as UTF-8') from None
    rules = []
    for line in text.split('\n'):
        pattern = line.strip()
        if not pattern or line.startswith('#'):
            continue
        is_exception = pattern.startswith('!')
        pattern = posixpath.normpath(pattern.removeprefix('!').strip()).lstrip('/')
        if pattern != '.':
            rules.append((re.compile(_regex(pattern), re.DOTALL), is_exception))
    return rules


def _is_ignored(path: str, rules: list[tuple[re.Pattern, bool]]) -> bool:
    """The last pattern that matches the path, or a directory above it, decides."""
    above = [path, *map(str, pathlib.PurePath(path).parents[:-1])]
    ignored = False
    for pattern, is_exception in rules:
        if any(pattern.fullmatch(part) for part in above):
            ignored = not is_exception
    return ignored


def _regex(pattern: str) -> str:
    """A pattern of .dockerignore or COPY: `*` and `?` stop at a slash, `**` does not."""
    result, position = '', 0
    while position < len(pattern):
        rest = pattern[position:]
        bracket = re.match(r'\[(\^?)((?:\\.|[^\]\\])+)\]', rest)
        if rest.startswith('**/'):
            result, step = result + '(?:.*/)?', 3
        elif rest.startswith('**'):
            result, step = result + '.*', 2
        elif rest[0] == '*':
            result, step = result + '[^/]*', 1
        elif rest[0] == '?':
            result, step = result + '[^/]', 1
        elif rest[0] == '\\' and len(rest) > 1:
            result, step = result + re.escape(rest[1]), 2
        elif bracket:
            result += f'(?!/)[{bracket[1]}{bracket[2].replace("[", chr(92) + "[")}]'
            step = bracket.end()
        else:
            result, step = result + re.escape(rest[0]), 1
        position += step
    return result
