"""Task directories: what is read, what is refused and how, and the order that resumes."""

import itertools
import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_jax.tasks.drawing import TaskIterator, TaskSource
from echo_jax.tasks.harbor import load_task
from echo_jax.tasks.parquet import write_parquet
from echo_jax.tasks.sources import load_sources, load_tasks
from echo_jax.types import Task

TOML = """
version = "1.0"
[metadata]
difficulty = "easy"
[agent]
timeout_sec = 90.5
[verifier]
timeout_sec = 30
[environment]
build_timeout_sec = 45.0
docker_image = "debian:bookworm-slim"
cpus = 2
memory_mb = 512
allow_internet = true
workdir = "/srv/work"
[environment.env]
NAME = "value"
"""


def write(path, toml=TOML, instruction='Say  hello.\n'):
    (path / 'tests').mkdir(parents=True)
    (path / 'tests' / 'test.sh').write_text('echo 1 > /logs/verifier/reward.txt\n')
    (path / 'task.toml').write_text(toml)
    (path / 'instruction.md').write_text(instruction)
    return path


def numbered(count):
    return [Task(task_id=f't{n:03d}', path=None, instruction=f'do {n}') for n in range(count)]


def test_every_field_is_read(tmp_path):
    path = write(tmp_path / 'hello')
    assert load_task(path) == Task(
        task_id='hello',
        path=path,
        instruction='Say  hello.',
        agent_timeout_sec=90.5,
        verifier_timeout_sec=30,
        build_timeout_sec=45.0,
        docker_image='debian:bookworm-slim',
        cpus=2,
        memory_mb=512,
        allow_internet=True,
        workdir='/srv/work',
        env={'NAME': 'value'},
    )


def test_defaults_and_the_dockerfiles_workdir(tmp_path):
    path = write(tmp_path / 'bare', toml='')
    assert load_task(path) == Task(task_id='bare', path=path, instruction='Say  hello.')
    (path / 'environment').mkdir()
    (path / 'environment' / 'Dockerfile').write_text('FROM x\nWORKDIR /a\nworkdir "/b"\nRUN y\n')
    assert load_task(path).workdir == '/b'


@pytest.mark.parametrize(
    ('toml', 'message'),
    [
        ('[agent', 'task.toml is not TOML'),
        ('agent = 3', 'agent is 3, expected a table'),
        ('[agent]\ntimeout_sec = "60"', "timeout_sec = '60', expected a finite number above 0"),
        ('[agent]\ntimeout_sec = true', 'timeout_sec = True, expected a finite number above 0'),
        ('[verifier]\ntimeout_sec = inf', 'timeout_sec = inf, expected a finite number above 0'),
        ('[verifier]\ntimeout_sec = nan', 'timeout_sec = nan, expected a finite number above 0'),
        ('[environment]\nmemory_mb = 1.5', 'memory_mb = 1.5, expected a whole number above 0'),
        ('[environment]\ncpus = -1', 'cpus = -1, expected a finite number above 0'),
        ('[environment]\nallow_internet = "no"', "allow_internet = 'no', expected true or false"),
        ('[environment]\nworkdir = "app"', "workdir = 'app', expected an absolute path"),
        ('[environment]\nenv = {A = 1}', "env = {'A': 1}, expected a table of texts"),
        ('[environment]\ndocker_image = ""', "docker_image = '', expected a text"),
    ],
)
def test_malformed_configuration_is_one_clear_line(tmp_path, toml, message):
    path = write(tmp_path / 'bad', toml=toml)
    with pytest.raises(ValueError) as error:
        load_task(path)
    assert message in str(error.value) and str(path / 'task.toml') in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('file', ['task.toml', 'instruction.md', 'tests/test.sh'])
def test_missing_and_unreadable_files_are_named(tmp_path, file):
    path = write(tmp_path / 'bad')
    (path / file).write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=rf'{file} is not UTF-8'):
        load_task(path)
    (path / file).unlink()
    with pytest.raises(ValueError, match=rf'{file} is missing'):
        load_tasks(tmp_path)  # a broken task is not a folder to be left out
    (path / file).mkdir()
    with pytest.raises(ValueError, match=rf'{file} is missing or no file'):
        load_task(path)


def test_an_empty_instruction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'instruction\.md is empty'):
        load_task(write(tmp_path / 'bad', instruction=' \n'))


def test_a_folder_of_tasks_is_sorted_and_others_are_named(tmp_path, caplog):
    for name in ('b', 'a', 'c'):
        write(tmp_path / name)
    (tmp_path / 'scripts').mkdir()
    (tmp_path / '.git').mkdir()
    (tmp_path / 'README.md').write_text('tasks')
    with caplog.at_level(logging.WARNING):
        assert [t.task_id for t in load_tasks(tmp_path)] == ['a', 'b', 'c']
    assert 'not tasks, left out: scripts' in caplog.text and '.git' not in caplog.text


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match='holds no tasks: it has no folders'):
        load_tasks(tmp_path)
    (tmp_path / 'scripts').mkdir()
    with pytest.raises(ValueError, match=r'its folders \(scripts\) are none'):
        load_tasks(tmp_path)
    with pytest.raises(ValueError, match='is no directory'):
        load_tasks(tmp_path / 'none')


def test_several_sources_and_their_marks(tmp_path):
    for name in ('one/b', 'one/a', 'two/c', 'three/d'):
        write(tmp_path / name)
    write_parquet(load_tasks(tmp_path / 'three'), tmp_path / 'd.parquet')
    sources = f'{tmp_path}/one:environment_only, {tmp_path}/two,{tmp_path}/d.parquet'
    loaded = load_sources(sources, tmp_path / 'cache')
    assert [path.name for path, _ in loaded] == ['one', 'two', 'd.parquet']
    got = [(t.task_id, t.environment_only) for _, tasks in loaded for t in tasks]
    assert got == [('a', True), ('b', True), ('c', False), ('d', False)]
    assert [t.task_id for t in load_tasks(sources, tmp_path / 'cache')] == ['a', 'b', 'c', 'd']
    marked = load_tasks(f'{tmp_path}/d.parquet:environment_only', tmp_path / 'cache')
    assert [t.environment_only for t in marked] == [True]
    # A folder that is really called so is one source, and is not marked.
    odd = (tmp_path / 'two').rename(tmp_path / 'one,two:environment_only')
    assert [(t.task_id, t.environment_only) for t in load_tasks(odd)] == [('c', False)]


def test_sources_that_do_not_fit_together(tmp_path):
    for name in ('one/a', 'one/b', 'two/b'):
        write(tmp_path / name)
    with pytest.raises(ValueError, match=r"two and .*one both have a task 'b'"):
        load_tasks(f'{tmp_path}/one,{tmp_path}/two')
    with pytest.raises(ValueError, match="both have a task 'a'"):
        load_tasks(f'{tmp_path}/one,{tmp_path}/one')
    with pytest.raises(ValueError, match='names no tasks'):
        load_tasks(' , ')
    with pytest.raises(ValueError, match='one:environment is no directory'):
        load_tasks(f'{tmp_path}/one:environment')


def test_long_prompts_are_dropped_and_counted():
    tasks = numbered(12)  # 'do 10' and 'do 11' have five characters, the others four
    source = TaskSource(tasks, count_tokens=len, max_prompt_tokens=4)
    assert (len(source), source.dropped) == (10, 2)
    assert list(source) == tasks[:10]
    with pytest.raises(ValueError, match='none of 12 tasks is left, 12 prompts are over'):
        TaskSource(tasks, count_tokens=len, max_prompt_tokens=3)
    with pytest.raises(ValueError, match='none of 0 tasks'):
        TaskSource([], count_tokens=len, max_prompt_tokens=4)


def test_epochs_hold_every_task_once_in_a_new_order():
    tasks = numbered(10)
    drawn = [t.task_id for step in itertools.islice(TaskIterator(tasks, seed=1, groups=4), 10)
             for t in step]  # fmt: skip
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == [t.task_id for t in tasks] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = itertools.islice(TaskIterator(tasks, seed=1, groups=4), 10)
    assert drawn == [t.task_id for step in again for t in step]
    other = itertools.islice(TaskIterator(tasks, seed=2, groups=4), 10)
    assert drawn != [t.task_id for step in other for t in step]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 12),
    groups=st.integers(1, 5),
    before=st.integers(0, 12),
    seed=st.integers(0, 2**31),
)
def test_a_resumed_iterator_goes_on_exactly(count, groups, before, seed):
    tasks = numbered(count)
    iterator = TaskIterator(tasks, seed=seed, groups=groups)
    for _ in range(before):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(6)]
    resumed = TaskIterator(tasks, seed=seed, groups=groups)
    resumed.set_state(json.loads(state))
    assert [next(resumed) for _ in range(6)] == expected


def test_a_position_among_other_tasks_is_refused():
    state = TaskIterator(numbered(5), seed=0, groups=2).get_state()
    for tasks, seed, groups in ((numbered(6), 0, 2), (numbered(5), 1, 2), (numbered(5), 0, 3)):
        with pytest.raises(ValueError, match='resume with the same tasks, seed and groups'):
            TaskIterator(tasks, seed=seed, groups=groups).set_state(state)
    with pytest.raises(ValueError, match='groups is 0'):
        TaskIterator(numbered(5), seed=0, groups=0)


def test_reading_tasks_imports_neither_jax_nor_grain():
    code = 'import sys, echo_jax.tasks.sources, echo_jax.tasks.generate as f; print(f.__name__, '
    code += "sorted({'jax', 'grain'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'echo_jax.tasks.generate []\n'
