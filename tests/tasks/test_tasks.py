"""Task directories: what is read, what is refused and how, and the order that resumes."""

import itertools
import json
import logging
import os
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
from tests.support.task_folders import write


def numbered(count):
    return [Task(task_id=f't{n:03d}', path=None, instruction=f'do {n}') for n in range(count)]


@pytest.mark.parametrize('file', ['task.toml', 'instruction.md', 'tests/test.sh'])
def test_missing_and_unreadable_files_are_named(tmp_path, file):
    path = write(tmp_path / 'bad')
    (path / file).write_bytes(b'\xff\xfe')
    if file == 'tests/test.sh':  # it may be in any encoding
        assert load_task(path).task_id == 'bad'
    else:
        with pytest.raises(ValueError, match=rf'{file} is not UTF-8'):
            load_task(path)
    (path / file).unlink()
    with pytest.raises(ValueError, match=rf'{file} is missing'):
        load_task(path)
    (path / file).mkdir()
    with pytest.raises(ValueError, match=rf'{file} is missing or no file'):
        load_task(path)


def test_an_empty_instruction_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'instruction\.md is empty'):
        load_task(write(tmp_path / 'bad', instruction=' \n'))


# ------------------------------------------------------------------------------ sets of tasks


def test_tasks_are_found_at_any_depth(tmp_path):
    for name in ('b', 'group/a', 'group/deep/c', 'b/environment/inner', '.git/no'):
        write(tmp_path / 'set' / name)
    (tmp_path / 'set' / 'docs').mkdir()
    (tmp_path / 'set' / 'README.md').write_text('tasks')
    (tmp_path / 'set' / 'again').symlink_to('group')
    (tmp_path / 'set' / 'loop').symlink_to('.')
    (found,) = load_sources(tmp_path / 'set')
    assert [(t.task_id, str(t.path.relative_to(found.path))) for t in found.tasks] == [
        ('a', 'group/a'),
        ('b', 'b'),
        ('c', 'group/deep/c'),
    ]
    assert found.left_out == [] and found.ignored == {}
    assert [t.task_id for t in load_tasks(tmp_path / 'set' / 'group' / 'a')] == ['a']


def test_names_that_two_folders_have_become_paths(tmp_path):
    for name in ('one/a', 'two/a', 'two/b'):
        write(tmp_path / name)
    assert [t.task_id for t in load_tasks(tmp_path)] == ['b', 'one__a', 'two__a']


def test_two_folders_with_one_id_are_refused(tmp_path):
    for name in ('a/b', 'c/b', 'a__b'):
        write(tmp_path / name)
    with pytest.raises(ValueError, match=r"a__b and .*/a/b would both be the task 'a__b'; results"):
        load_tasks(tmp_path)
    (tmp_path / 'c' / 'b').rename(tmp_path / 'c' / 'd')
    assert [t.task_id for t in load_tasks(tmp_path)] == ['a__b', 'b', 'd']


def test_an_odd_task_is_left_out_and_named(tmp_path, caplog):
    for name in ('a', 'b', *(f'odd{n}' for n in range(10))):
        write(tmp_path / name, '[environment]\nnew_key = 1\n')
    (tmp_path / 'odd0' / 'task.toml').unlink()
    (tmp_path / 'odd1' / 'instruction.md').write_bytes(b'\xff')
    for n in range(2, 10):
        (tmp_path / f'odd{n}' / 'tests' / 'test.sh').unlink()
    with caplog.at_level(logging.WARNING):
        assert [t.task_id for t in load_tasks(tmp_path)] == ['a', 'b']
    one, two = (record.getMessage() for record in caplog.records)
    assert f'{tmp_path}: 10 of 12 tasks left out: odd0 (task.toml is missing; ' in one
    assert 'odd1 (' in one and 'is not UTF-8' in one and 'odd2 (' in one
    assert one.endswith(' and 2 more') and 'odd8' not in one
    assert two == f'{tmp_path}: Harbor does not know, and reads past: [environment] new_key (2)'
    (found,) = load_sources(tmp_path)
    assert [one.task_id for one in found.left_out] == [f'odd{n}' for n in range(10)]


@pytest.mark.parametrize(
    ('toml', 'reason'),
    [
        ('[environment]\nos = 1\n', '[environment] os = 1, expected linux or windows; correct it'),
        (
            f'[environment]\ncpus = 1{"0" * 400}\n',
            f'cpus = 1{"0" * 79}..., expected a finite number, 0 or more; correct it',
        ),
        (
            '[environment]\nmemory = "1e308G"\n',
            "memory = '1e308G', expected such as '2G' or '512M'; correct it",
        ),
        (f'deep = {"[" * 3000}{"]" * 3000}\n', 'task.toml has too many values within values'),
    ],
    ids=['no text', 'no float', 'inf', 'deep'],
)
def test_the_others_are_read_whatever_one_says(tmp_path, toml, reason):
    for name in ('a', 'b'):
        write(tmp_path / name)
    write(tmp_path / 'odd', toml)
    (found,) = load_sources(tmp_path)
    assert [task.task_id for task in found.tasks] == ['a', 'b']
    ((task_id, why),) = found.left_out
    assert task_id == 'odd' and reason in why and '\n' not in why
    assert why.startswith(f'{tmp_path}/odd/task.toml')


def test_folders_that_may_not_be_entered_are_left_out_and_named(tmp_path):
    top = tmp_path / 'set'
    for name in ('a', 'b', 'shut', 'deep/c'):
        write(top / name)
    (top / 'b' / 'environment').mkdir()
    (top / 'lost+found').mkdir()
    listed = registered(top, *({'name': name, 'path': name} for name in ('a', 'shut')))
    code = (
        'import sys; from echo_jax.tasks.sources import load_sources\n'
        'for source in sys.argv[1:]:\n'
        '    (one,) = load_sources(source)\n'
        '    print([task.task_id for task in one.tasks])\n'
        '    print(*(f"{name}: {why}" for name, why in one.left_out), sep="\\n")'
    )
    command = [sys.executable, '-c', code, top, listed]
    if os.geteuid() == 0:  # without these two rights, modes hold for root as for others
        command = ['setpriv', '--bounding-set=-dac_override,-dac_read_search', *command]
    shut = [top / name for name in ('b/environment', 'shut', 'deep', 'lost+found')]
    for folder in shut:
        folder.chmod(0)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        for folder in shut:
            folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['a']",
        f'b: {top}/b/environment/docker-compose.yaml cannot be read (Permission denied)',
        f'deep: {top}/deep cannot be read (Permission denied)',
        f'lost+found: {top}/lost+found cannot be read (Permission denied)',
        f'shut: {top}/shut cannot be read (Permission denied)',
        "['a']",
        'shut: shut is not there, has no task.toml, or may not be entered',
    ]


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'holds no tasks: a task is a folder with task.toml'):
        load_tasks(tmp_path)
    with pytest.raises(ValueError, match='is no directory'):
        load_tasks(tmp_path / 'none')
    write(tmp_path / 'bad', instruction='')
    with pytest.raises(ValueError, match=r'none of 1 tasks can be read: bad \(.*is empty'):
        load_tasks(tmp_path)


# --------------------------------------------------------------------------- Harbor's registries


def registered(tmp_path, *tasks, version='1.0'):
    listed = [{'name': 'set', 'version': version, 'description': '', 'tasks': list(tasks)}]
    (tmp_path / 'registry.json').write_text(json.dumps(listed))
    return tmp_path / 'registry.json'


def test_a_registry_leads_to_tasks_on_this_machine(tmp_path):
    write(tmp_path / 'clone' / 'tasks' / 'a')
    write(tmp_path / 'elsewhere' / 'b')
    away = {'git_url': 'https://example.org/r.git', 'git_commit_id': 'HEAD'}
    file = registered(
        tmp_path / 'clone',
        {'name': 'a', 'path': 'tasks/a', **away},  # the registry lies in its own repository
        {'name': 'org/b', 'path': str(tmp_path / 'elsewhere' / 'b')},
        {'name': 'c', 'path': 'tasks/c', **away},
        {'name': 'd', 'path': 'tasks/d'},
    )
    (found,) = load_sources(file)
    assert [task.task_id for task in found.tasks] == ['a', 'org__b']
    reasons = dict(found.left_out)
    assert reasons['c'] == 'tasks/c is in a repository; git clone https://example.org/r.git'
    assert 'tasks/d is not there' in reasons['d']
    # A folder without tasks of its own is read by its registry.
    (file.parent / 'tasks').rename(tmp_path / 'tasks')
    with pytest.raises(ValueError, match=r'tasks in 1 repositories|can be read'):
        load_tasks(registered(tmp_path / 'clone', {'name': 'a', 'path': 'tasks/a', **away}).parent)


@pytest.mark.parametrize('here', ['old/a', 'new/a'])
def test_each_version_of_a_task_has_its_own_id(tmp_path, here):
    write(tmp_path / here)
    write(tmp_path / 'b')
    sets = [
        ('set', '1.0', {'name': 'a', 'path': 'old/a'}),
        ('set', '2.0', {'name': 'a', 'path': 'new/a'}),
        ('set', '1.0', {'name': 'b', 'path': 'b'}),
        ('set', '2.0', {'name': 'b', 'path': 'b'}),  # as before, and so one entry
        ('set', '3.0', {'name': 'b', 'path': 'b', 'git_url': 'https://example.org/moved.git'}),
        ('other', '1.0', {'name': 'a', 'path': 'a'}),
    ]
    (tmp_path / 'registry.json').write_text(
        json.dumps([{'name': name, 'version': v, 'tasks': [task]} for name, v, task in sets])
    )
    (found,) = load_sources(tmp_path / 'registry.json')
    ids = {'old/a': 'set@1.0__a', 'new/a': 'set@2.0__a'}
    assert {t.task_id for t in found.tasks} == {ids.pop(here), 'set@1.0__b'}
    ((away, gone),) = ((name, path) for path, name in ids.items())
    reasons = dict(found.left_out)
    assert sorted(reasons) == ['other__a', away, 'set@3.0__b']
    assert reasons[away].startswith(f'{gone} is not there')
    assert reasons['set@3.0__b'] == 'b is read as set@1.0__b already'


def test_a_registry_with_one_id_for_two_tasks_is_refused(tmp_path):
    write(tmp_path / 'new' / 'a')
    file = registered(tmp_path, *({'name': 'a', 'path': f'{age}/a'} for age in ('old', 'new')))
    with pytest.raises(ValueError, match=r"two tasks with the id 'set@1\.0__a', old/a and new/a; "):
        load_tasks(file)


def test_a_registry_of_other_machines_says_how_to_get_them(tmp_path):
    url = 'https://example.org/r.git'
    file = registered(tmp_path, {'name': 'a', 'path': 'a', 'git_url': url})
    with pytest.raises(ValueError, match=rf'none is here; git clone {url}, and give --tasks'):
        load_tasks(file)
    file.write_text('{"not": "a registry"}')
    with pytest.raises(ValueError, match='is no registry of Harbor, a list of'):
        load_tasks(file)
    file.unlink()
    digest = 'sha256:' + 'a' * 64
    (tmp_path / 'dataset.toml').write_text(
        f'[dataset]\nname = "org/set"\n[[tasks]]\nname = "org/a"\ndigest = "{digest}"\n'
    )
    with pytest.raises(ValueError, match=r'names 1 tasks .*; harbor download org/set, and give'):
        load_tasks(tmp_path)


# ------------------------------------------------------------------------------ several sources


def test_several_sources_and_their_marks(tmp_path):
    for name in ('one/b', 'one/a', 'two/c', 'three/d'):
        write(tmp_path / name)
    write_parquet(load_tasks(tmp_path / 'three'), tmp_path / 'd.parquet')
    sources = f'{tmp_path}/one:environment_only, {tmp_path}/two,{tmp_path}/d.parquet'
    loaded = load_sources(sources, tmp_path / 'cache')
    assert [one.path.name for one in loaded] == ['one', 'two', 'd.parquet']
    got = [(t.task_id, t.environment_only) for one in loaded for t in one.tasks]
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
