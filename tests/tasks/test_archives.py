"""Tars that mean harm, and those that only look odd, unpacked for real."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.tasks import archives

KINDS = {
    'file': tarfile.REGTYPE,
    'dir': tarfile.DIRTYPE,
    'symlink': tarfile.SYMTYPE,
    'hardlink': tarfile.LNKTYPE,
    'fifo': tarfile.FIFOTYPE,
    'device': tarfile.CHRTYPE,
    'disk': tarfile.BLKTYPE,
    'name of the next': tarfile.GNUTYPE_LONGNAME,
}


def tar(*members, **options) -> bytes:
    """Members are (name, kind, content or link target, mode)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', **options) as archive:
        for name, kind, *rest in members:
            info = tarfile.TarInfo(name)
            info.type = KINDS[kind]
            value = rest[0] if rest else ''
            info.mode = rest[1] if len(rest) > 1 else 0o644
            content = value.encode() if kind == 'file' else b''
            info.linkname = '' if kind == 'file' else value
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


GOOD = tar(
    ('task.toml', 'file', 'version = "1.0"'),
    ('tests', 'dir'),
    ('tests/test.sh', 'file', 'echo 1', 0o755),
    ('tests/data/a.txt', 'file', 'a'),
    ('tests/b.txt', 'symlink', 'data/a.txt'),
    ('tests/c.txt', 'hardlink', 'tests/data/a.txt'),
    ('empty', 'dir'),
)


def unpacked(data: bytes, folder) -> dict[str, str | None]:
    """Path below the folder: a file's text, a link's target after '->', None of a directory."""
    folder.mkdir()
    archives.unpack(data, folder)
    found = {}
    for path in sorted(folder.rglob('*')):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f'-> {os.readlink(path)}'
        else:
            found[name] = None if path.is_dir() else path.read_text()
    return found


@pytest.mark.parametrize('pack', [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_what_goes_in_comes_out(tmp_path, pack):
    assert unpacked(pack(GOOD), tmp_path / 'out') == {
        'task.toml': 'version = "1.0"',
        'tests': None,
        'tests/test.sh': 'echo 1',
        'tests/data': None,
        'tests/data/a.txt': 'a',
        'tests/b.txt': '-> data/a.txt',
        'tests/c.txt': 'a',
        'empty': None,
    }
    mode = lambda name: stat.S_IMODE((tmp_path / 'out' / name).stat().st_mode)  # noqa: E731
    assert mode('tests/test.sh') == 0o755 and mode('task.toml') == 0o644


@pytest.mark.parametrize('lead', ['./', 'task/', './task/'])
def test_one_leading_folder_is_left_out(tmp_path, lead):
    data = tar(
        (lead.rstrip('/'), 'dir'),
        (f'{lead}task.toml', 'file', 'x'),
        (f'{lead}tests/test.sh', 'file', 'y'),
        (f'{lead}tests/again', 'hardlink', f'{lead}task.toml'),
    )
    expected = {'task.toml': 'x', 'tests': None, 'tests/test.sh': 'y', 'tests/again': 'x'}
    assert unpacked(data, tmp_path / 'out') == expected


SUSPECT = [
    ([('/etc/passwd', 'file', 'x')], "'/etc/passwd' leads outside"),
    ([('../x', 'file', 'x')], "'../x' leads outside"),
    ([('tests/../../x', 'file', 'x')], 'leads outside'),
    ([('a', 'symlink', '/etc')], "'a' links outside the task directory, '/etc'"),
    ([('a', 'symlink', '')], "'a' links outside the task directory, ''"),
    ([('tests/a', 'symlink', '../../x')], "'tests/a' links outside"),
    ([('a', 'symlink', 'b'), ('a/x', 'file', 'x')], "'a/x' lies under 'a', which is no directory"),
    ([('a/x', 'file', 'x'), ('a', 'symlink', 'b')], "'a' comes twice"),
    ([('a', 'file', 'x'), ('a', 'file', 'y')], "'a' comes twice"),
    ([('a', 'file', 'x'), ('./a', 'symlink', 'b')], "'a' comes twice"),
    ([('a', 'file', 'x'), ('a', 'dir')], "'a' comes twice"),
    ([('a', 'hardlink', '/etc/passwd')], "'a' is a hard link to '/etc/passwd', no file before it"),
    ([('a', 'hardlink', '../x')], 'no file before it'),
    ([('a', 'symlink', 'b'), ('c', 'hardlink', 'a')], 'no file before it'),
    ([('pipe', 'fifo')], "'pipe' is no file, directory or link"),
    ([('null', 'device')], "'null' is no file"),
    ([('sda', 'disk')], "'sda' is no file"),
    ([('su', 'file', 'x', 0o4755)], "'su' has mode 4755, setuid or setgid"),
    ([('sg', 'file', 'x', 0o2755)], "'sg' has mode 2755"),
    ([('a\0b', 'file', 'x')], ''),  # tarfile itself ends the name there
    ([('n' * 300, 'file', 'x')], 'is a name of 300 bytes'),
    ([('a/' * 600 + 'b', 'file', 'x')], 'is a name of 1201 bytes'),
    ([('.', 'symlink', 'x')], 'stands in the place of the task directory'),
]


@pytest.mark.parametrize(('members', 'message'), SUSPECT)
def test_harm_is_refused_before_anything_is_written(tmp_path, members, message):
    folder = tmp_path / 'deep' / 'out'
    folder.mkdir(parents=True)
    data = tar(('task.toml', 'file', 'x'), *members)
    if not message:
        archives.unpack(data, folder)
        assert sorted(p.name for p in folder.iterdir()) == ['a', 'task.toml']
        return
    with pytest.raises(ValueError) as error:
        archives.unpack(data, folder)
    assert message in str(error.value) and '\n' not in str(error.value)
    assert sorted(tmp_path.rglob('*')) == [tmp_path / 'deep', folder]


def test_links_that_lead_outside_only_together(tmp_path):
    # By its text `x/y/up` stays inside: x/y/../.. is the root. But x/y is a link to the root.
    data = tar(
        ('task.toml', 'file', 'x'),
        ('x', 'dir'),
        ('x/y', 'symlink', '..'),
        ('out', 'symlink', 'x/y/../etc'),
    )
    (tmp_path / 'out').mkdir()
    with pytest.raises(ValueError, match=r"'out' links outside by way of others, to 'x/y/../etc'"):
        archives.unpack(data, tmp_path / 'out')


def test_names_that_are_no_utf8(tmp_path):
    data = tar(('caf\udce9', 'file', 'x'), encoding='utf-8', errors='surrogateescape')
    with pytest.raises(ValueError, match=r"'caf\\udce9' is no UTF-8"):
        archives.unpack(data, tmp_path)


def test_bombs(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, 'MAX_BYTES', 1 << 20)
    monkeypatch.setattr(archives, 'MAX_MEMBERS', 50)
    zeros = tar(('zeros', 'file', '\0' * (3 << 20)))
    with pytest.raises(ValueError, match='unpacks to over 1 MiB'):
        archives.unpack(gzip.compress(zeros), tmp_path)
    with pytest.raises(ValueError, match='over 1 MiB'):
        archives.unpack(zeros, tmp_path)
    with pytest.raises(ValueError, match='over 50 members'):
        archives.unpack(tar(*((f'{i}', 'dir') for i in range(51))), tmp_path)
    deep = (f'{i}/' + 'd/' * 30 + 'x' for i in range(3))
    with pytest.raises(ValueError, match=r"x' takes the folders over 50"):
        archives.unpack(tar(*((name, 'file', 'x') for name in deep)), tmp_path)
    # A hard link costs nothing in the archive, and a whole copy here.
    half = ('a', 'file', 'x' * (600 << 10))
    with pytest.raises(ValueError, match=r"'b' takes the files over 1 MiB"):
        archives.unpack(tar(half, ('b', 'hardlink', 'a')), tmp_path)
    assert list(tmp_path.iterdir()) == []


def sealed(data: bytes) -> bytes:
    """The archive with right checksums, so that its headers are believed."""
    data = bytearray(data)
    for block in range(0, len(data) - 511, 512):
        if data[block + 257 : block + 262] == b'ustar':
            data[block + 148 : block + 156] = b' ' * 8
            data[block + 148 : block + 156] = b'%06o\0 ' % sum(data[block : block + 512])
    return bytes(data)


def sparse(size: int) -> bytes:
    """A file that claims `size` bytes and brings none of them (GNU's old sparse format)."""
    info = tarfile.TarInfo('sparse')
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:410] = b'%011o\0%011o\0' % (0, 0)
    block[483:495] = b'%011o\0' % size
    return sealed(block) + bytes(1024)


def test_a_sparse_file_counts_whole(tmp_path):
    (tmp_path / 'small').mkdir()
    archives.unpack(sparse(5000), tmp_path / 'small')
    assert (tmp_path / 'small' / 'sparse').read_bytes() == bytes(5000)
    with pytest.raises(ValueError, match=r"'sparse' takes the files over 1024 MiB"):
        archives.unpack(sparse(7 << 30), tmp_path)


def test_damage(tmp_path):
    for name, data in {
        'text': b'no tar at all, but long enough to be one' * 20,
        'nothing': b'',
        'cut': GOOD[:3000],
        'cut gzip': gzip.compress(GOOD)[:-20],
        'bad gzip': b'\x1f\x8b' + bytes(100),
        'bad xz': lzma.compress(GOOD)[:40] + b'x' * 40,
        'a size of 2**87': sealed(GOOD[:124] + b'\x80' + (2**87).to_bytes(11, 'big') + GOOD[136:]),
        'headers of headers': tar(*[('x', 'name of the next', '')] * 3000),
        'a header in the middle': GOOD[:1024] + b'\xff' * 512 + GOOD[1536:],
    }.items():
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match='damaged') as error:
            archives.unpack(data, tmp_path / name)
        assert '\n' not in str(error.value), name


@settings(max_examples=100, deadline=None)
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, 6 * 1024), st.binary(min_size=1, max_size=12)), max_size=8
    )
)
def test_any_damage_is_a_value_error_and_stays_inside(tmp_path_factory, cuts):
    data = bytearray(GOOD)
    for start, garbage in cuts:
        data[start : start + len(garbage)] = garbage
    folder = tmp_path_factory.mktemp('fuzz') / 'a' / 'b'
    folder.mkdir(parents=True)
    with contextlib.suppress(ValueError):
        archives.unpack(sealed(data), folder)
    inside = [folder.parent, folder, *folder.rglob('*')]
    assert set(folder.parents[1].rglob('*')) == set(inside)


def test_packing_is_the_same_wherever_and_comes_back(tmp_path):
    for name in ('one', 'two'):
        archives_folder = tmp_path / name
        archives_folder.mkdir()
        archives.unpack(GOOD, archives_folder)
        os.utime(archives_folder / 'task.toml', (1, 1 if name == 'one' else 2))
    first, second = (archives.pack(tmp_path / name) for name in ('one', 'two'))
    assert first == second
    assert unpacked(first, tmp_path / 'three') == unpacked(GOOD, tmp_path / 'four')


def test_what_would_be_refused_is_not_packed(tmp_path):
    (tmp_path / 'task.toml').write_text('x')
    (tmp_path / 'out').symlink_to('/etc')
    with pytest.raises(ValueError, match="'out' links outside"):
        archives.pack(tmp_path)
    (tmp_path / 'out').unlink()
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match="'pipe' is no file"):
        archives.pack(tmp_path)
    (tmp_path / 'pipe').unlink()
    (tmp_path / 'task.toml').chmod(0o4755)
    with pytest.raises(ValueError, match=r"'task\.toml' has mode 4755"):
        archives.pack(tmp_path)
