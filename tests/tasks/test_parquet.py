"""Task sets in parquet: the way there and back, and every row that must be refused."""

import dataclasses
import io
import tarfile
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from echo_jax.tasks import archives, parquet
from echo_jax.tasks.generate import generate_tasks
from echo_jax.tasks.sources import load_sources, load_tasks

FILES = {
    'task.toml': '[agent]\ntimeout_sec = 9\n',
    'instruction.md': 'Say hello.\n',
    'tests/test.sh': 'echo 1 > /logs/verifier/reward.txt\n',
}


def packed(files: dict[str, str], lead: str = '') -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(lead + name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def row(path='hello', binary=None, prompt=None) -> dict:
    said = [{'role': 'system', 'content': 'Be good.'}, {'role': 'user', 'content': 'From prompt.'}]
    binary = packed(FILES) if binary is None else binary
    return {'prompt': said if prompt is None else prompt, 'path': path, 'task_binary': binary}


def write(file, *rows, schema=parquet.SCHEMA, **options):
    pq.write_table(pa.Table.from_pylist(list(rows), schema), file, **options)
    return file


@pytest.fixture(scope='module')
def generated(tmp_path_factory):
    return generate_tasks(tmp_path_factory.mktemp('tasks') / 'set', split='train', count=70)


def contents(task) -> dict:
    files = (p for p in task.path.rglob('*') if p.is_file())
    return {
        str(p.relative_to(task.path)): (p.read_bytes(), p.stat().st_mode & 0o777) for p in files
    }


def test_a_set_comes_back_as_it_was(generated, tmp_path):
    tasks = load_tasks(generated)
    file = tmp_path / 'set.parquet'
    parquet.write_parquet(tasks, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['set.parquet']
    read = load_tasks(file, tmp_path / 'cache')
    assert len(read) == 70 and not set(t.path for t in read) & set(t.path for t in tasks)
    for old, new in zip(tasks, read):
        assert dataclasses.replace(new, path=old.path, source=old.source) == old
        assert contents(new) == contents(old) and len(contents(new)) >= 6
    # The columns that the field's own readers look for.
    table = pq.read_table(file)
    assert table.schema.names == ['prompt', 'path', 'task_binary']
    first = table.slice(0, 1).to_pylist()[0]
    assert first['prompt'] == [{'role': 'user', 'content': tasks[0].instruction}]
    # The same tasks give the same rows.
    parquet.write_parquet(read, tmp_path / 'again.parquet')
    assert pq.read_table(tmp_path / 'again.parquet').equals(table)


def test_a_second_start_unpacks_nothing(tmp_path, monkeypatch):
    file = write(tmp_path / 'set.parquet', row('a'), row('b', packed({**FILES, 'x': 'x'})))
    first = load_tasks(file, tmp_path / 'cache')
    stamps = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / 'cache').rglob('[!.]*')}  # noqa: E731
    before = stamps()
    monkeypatch.setattr(archives, 'unpack', None)  # would be a TypeError
    assert load_tasks(file, tmp_path / 'cache') == first
    # Another file with the same task under another id shares its files.
    other = write(tmp_path / 'other.parquet', row('c'))
    (shared,) = load_tasks(other, tmp_path / 'cache')
    assert shared.task_id == 'c' and shared.path == first[0].path
    assert stamps() == before and len(before) > 8


def test_what_a_killed_reader_left_is_not_taken_for_a_task(tmp_path, monkeypatch):
    file = write(tmp_path / 'set.parquet', row())
    real = archives.unpack

    def killed(data, folder):
        real(data, folder)
        (folder / 'task.toml').unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(archives, 'unpack', killed)
    with pytest.raises(KeyboardInterrupt):
        load_tasks(file, tmp_path / 'cache')
    monkeypatch.setattr(archives, 'unpack', real)
    (task,) = load_tasks(file, tmp_path / 'cache')
    assert contents(task).keys() == FILES.keys()
    assert sorted(p.name for p in (tmp_path / 'cache').iterdir()) == ['.lock', task.path.name]


def test_readers_at_once(tmp_path):
    rows = [row(f't{i}', packed({**FILES, 'i': str(i)})) for i in range(40)]
    file, seen = write(tmp_path / 'set.parquet', *rows), []
    read = lambda: seen.append(load_tasks(file, tmp_path / 'cache'))  # noqa: E731
    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4 and all(tasks == seen[0] for tasks in seen) and len(seen[0]) == 40
    assert all(contents(task).keys() == {*FILES, 'i'} for task in seen[0])


@pytest.mark.parametrize('lead', ['./', 'hello/', 'any name/'])
def test_a_leading_folder(tmp_path, lead):
    (task,) = load_tasks(
        write(tmp_path / 's.parquet', row('hello', packed(FILES, lead))), tmp_path / 'c'
    )
    assert (task.task_id, task.instruction, task.agent_timeout_sec) == ('hello', 'Say hello.', 9)


@pytest.mark.parametrize(
    ('said', 'instruction'),
    [('Do it.', 'Do it.'), ('Think first, then call.\n\nTask: Do it.\nNow.', 'Do it.\nNow.')],
)
def test_an_archive_without_instruction_takes_the_prompts(tmp_path, said, instruction):
    bare = packed({name: text for name, text in FILES.items() if name != 'instruction.md'})
    prompt = [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': said}]
    file = write(tmp_path / 's.parquet', row('a', bare, prompt), row('b', packed(FILES), prompt))
    without, with_one = load_tasks(file, tmp_path / 'cache')
    assert without.instruction == instruction and with_one.instruction == 'Say hello.'
    assert (without.path / 'instruction.md').read_text() == instruction


def evil(name='../../out') -> bytes:
    return packed({**FILES, name: 'x'})


@pytest.mark.parametrize(
    ('bad', 'name', 'message'),
    [
        (row('b', evil()), 'b', "'../../out' leads outside the task directory"),
        (row('b', evil('/etc/x')), 'b', "'/etc/x' leads outside"),
        (row('b', b'no tar'), 'b', 'the archive is damaged or no tar'),
        (row('b', b''), 'b', 'the archive is damaged or no tar'),
        (row('../a'), 'row 1', "path is '../a', expected a plain name"),
        (row('..'), 'row 1', "path is '..'"),
        (row('a/b'), 'row 1', "path is 'a/b'"),
        (row(''), 'row 1', "path is ''"),
        (row('a\nb'), 'row 1', r"path is 'a\nb'"),
        (row('x' * 300), 'row 1', 'path is '),
        (row('b', prompt=[]), 'b', 'prompt is [], expected chat messages'),
        (row('b', prompt=[{'role': 'system', 'content': 'x'}]), 'b', 'prompt is [{'),
        (row('b', packed({'task.toml': ''})), 'b', 'tests/test.sh is missing or no file'),
        (row('b', packed({**FILES, 'task.toml': '['})), 'b', 'is not TOML'),
    ],
)
def test_a_bad_row_is_left_out_and_named(tmp_path, bad, name, message):
    file = write(tmp_path / 'set.parquet', row('good'), bad)
    (found,) = load_sources(file, tmp_path / 'cache')
    assert [task.task_id for task in found.tasks] == ['good']
    ((task_id, reason),) = found.left_out
    assert task_id == name and message in reason and '\n' not in reason
    assert not (tmp_path / 'out').exists()
    with pytest.raises(ValueError, match='none of 1 tasks can be read') as error:
        load_sources(write(file, bad), tmp_path / 'cache')
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([row('a'), row('a')], "row 1, 'a': its id is taken, by 'a'"),
        ([row('a'), row('A')], "row 1, 'A': its id is taken, by 'a'"),
        ([], 'has no rows'),
    ],
)
def test_ids_that_clash_are_one_line(tmp_path, rows, message):
    file = write(tmp_path / 'set.parquet', *rows)
    with pytest.raises(ValueError) as error:
        load_tasks(file, tmp_path / 'cache')
    said = str(error.value)
    assert message in said and str(file) in said and '\n' not in said


def test_columns_that_are_missing_or_of_another_kind(tmp_path):
    file = tmp_path / 'set.parquet'
    for column in parquet.SCHEMA.names:
        schema = parquet.SCHEMA.remove(parquet.SCHEMA.get_field_index(column))
        write(file, {k: v for k, v in row().items() if k != column}, schema=schema)
        with pytest.raises(ValueError, match=rf'lacks the column {column}; it has .*, a task set'):
            load_tasks(file, tmp_path / 'cache')
    for column, kind, value, expected in (
        ('path', pa.int64(), 3, 'path is 3, expected a plain name'),
        ('path', pa.string(), None, 'path is None, expected a plain name'),
        ('task_binary', pa.string(), 'x', "task_binary is 'x', expected the bytes of a tar"),
        ('task_binary', pa.binary(), None, 'task_binary is None, expected the bytes'),
        ('prompt', pa.string(), 'Do it.', "prompt is 'Do it.', expected chat messages"),
        ('prompt', parquet.SCHEMA.field('prompt').type, None, 'prompt is None, expected chat'),
    ):
        index = parquet.SCHEMA.get_field_index(column)
        schema = parquet.SCHEMA.set(index, pa.field(column, kind))
        write(file, {**row(), column: value}, schema=schema)
        with pytest.raises(ValueError) as error:
            load_tasks(file, tmp_path / 'cache')
        assert str(file) in str(error.value) and expected in str(error.value)


def test_files_that_are_no_parquet(tmp_path):
    file = tmp_path / 'set.parquet'
    with pytest.raises(ValueError, match='is not there'):
        load_tasks(file, tmp_path / 'cache')
    for content in (b'', b'PAR1 but no more PAR1', b'x' * 5000):
        file.write_bytes(content)
        with pytest.raises(ValueError, match='cannot be read, or is no parquet file') as error:
            load_tasks(file, tmp_path / 'cache')
        assert '\n' not in str(error.value)
    write(file, row(), row('b', packed({**FILES, 'x': 'y' * 3000})), compression='zstd')
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='cannot be read'):
        load_tasks(file, tmp_path / 'cache')
    middle = len(whole) // 3  # of the compressed pages
    file.write_bytes(whole[:middle] + b'\xff' * 60 + whole[middle + 60 :])
    with pytest.raises(ValueError, match='cannot be read') as error:
        load_tasks(file, tmp_path / 'cache')
    assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match='has to be unpacked; say where to with --workdir'):
        load_tasks(file)


def test_large_types_of_other_writers(tmp_path):
    message = pa.struct([('content', pa.large_string()), ('role', pa.large_string())])
    schema = pa.schema(
        [
            ('extra', pa.int32()),
            ('task_binary', pa.large_binary()),
            ('path', pa.large_string()),
            ('prompt', pa.large_list(message)),
        ]
    )
    rows = ({**row(f't{i}', packed({**FILES, 'i': str(i)})), 'extra': i} for i in range(100))
    file = write(tmp_path / 'set.parquet', *rows, schema=schema, row_group_size=7)
    tasks = load_tasks(file, tmp_path / 'cache')
    assert sorted((t.path / 'i').read_text() for t in tasks) == sorted(map(str, range(100)))


def test_a_task_that_would_be_refused_is_not_packed(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / 'set' / 'hello' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / 'set' / 'hello' / 'link').symlink_to('/etc')
    with pytest.raises(ValueError, match=r"set/hello: 'link' links outside"):
        parquet.write_parquet(load_tasks(tmp_path / 'set'), tmp_path / 'set.parquet')
    assert not (tmp_path / 'set.parquet').exists()
