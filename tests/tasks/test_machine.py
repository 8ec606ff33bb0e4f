"""Tasks on a machine with tools of its own, in a real bash; and what their sessions tell."""

import asyncio
import collections
import pathlib
import re
import shutil
import subprocess

import pytest

from echo_jax.sandbox import local
from echo_jax.tasks.generate import WORDS, demonstration, draft_task, generate_tasks, usage
from echo_jax.tasks.harbor import load_task
from echo_jax.tasks.sources import load_tasks
from tests.support.sandboxes import SEC, opened, refusal

FAMILIES = ['machine']
SEED = 3


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """One task of one, of two and of three tools."""
    folder = tmp_path_factory.mktemp('tasks') / 'train'
    generate_tasks(folder, split='train', count=3, seed=SEED, families=FAMILIES)
    return load_tasks(folder)


@pytest.fixture
def run(tmp_path):
    """run(task, script): what a shell in the task's environment prints, and the tests' reward."""

    def run(task, script: str) -> tuple[str, str]:
        app, environment = tmp_path / 'app', task.path / 'environment'
        shutil.rmtree(app, ignore_errors=True)
        shutil.copytree(environment / 'files', app)
        script = f'PATH={environment}/tools:$PATH\n{script}'
        done = subprocess.run(['bash'], input=script, cwd=app, capture_output=True, text=True)
        tests = (task.path / 'tests' / 'test.sh').read_text()
        tests = tests.replace('cd /app', f'cd {app}').replace('/logs/verifier', str(tmp_path))
        subprocess.run(['bash'], input=tests, cwd='/', text=True, check=True)
        return done.stdout + done.stderr, (tmp_path / 'reward.txt').read_text().strip()

    return run


def tools_of(split: str, index: int, family: str = 'machine', seed: int = SEED) -> dict[str, str]:
    """name -> option of the tools that a task has, out of their scripts."""
    _, draft = draft_task(seed, split, index, [family])
    return {n: re.search(r'== -(.) ', text)[1] for n, text in draft.tools.items()}


def test_the_solution_earns_1_and_nothing_earns_0(tasks, run):
    for number, task in enumerate(tasks, 1):
        solution = (task.path / 'solution' / 'solve.sh').read_text()
        assert len(demonstration(task)) == number + 1  # a turn for each tool, and done
        assert run(task, solution) == ('', '1')
        assert run(task, '') == ('', '0')


def test_another_option_or_no_file_changes_nothing(tasks, run):
    task = tasks[0]
    name, option, file = demonstration(task)[0][1].split()
    line = f'usage: {name} {option} FILE\n'
    for call in (name, f'{name} {option}', f'{name} {option.upper()} {file}', f'{name} {file}'):
        printed, reward = run(task, f'{call}; echo $?; cat {file}')
        assert printed == f'2\n{(task.path / "environment" / "files" / file).read_text()}{line}'
        assert reward == '0'
    printed, _ = run(task, f'{name} {option} nope.txt; echo $?')
    assert printed == f'1\n{name}: nope.txt: No such file or directory\n'


def test_whoever_has_not_called_the_tools_in_order_earns_0(tasks, run):
    task = tasks[2]
    first, second, third = [command for _, command, _ in demonstration(task) if command]
    *_, file = first.split()
    names = [command.split()[0] for command in (first, second, third)]
    written = [f'echo {name} {"0" * 8} >> {file}' for name in names]
    copied = 'printf "luma\\n" > other.txt; {} other.txt; tail -n1 other.txt >> {}'
    other = copied.format(third.rpartition(' ')[0], file)
    cheats = [
        [second, first, third],
        [first, third, second],
        [first, second],
        [first, second, third, third],
        written,
        [first, second, written[2]],
        [first, second, other],  # a real seal, of another file
        [first, second, third, f'mv {file} x; ln -s x {file}'],
        [first, second, third, f'rm {file}; mkfifo {file}'],
        [f'echo more >> {file}', first, second, third],
    ]
    for cheat in cheats:
        assert run(task, '\n'.join(cheat))[1] == '0', cheat
    # Any other way to call the tools in order is as good.
    assert run(task, f'{first} && {second} && {third}; touch note')[1] == '1'


def test_a_real_sandbox_has_the_tools_in_path(tasks):
    if refusal('auto'):
        pytest.skip(refusal('auto'))

    async def main(task):
        async with opened(local.LocalSandbox(task)) as sandbox:
            command, line = usage(task)
            wrong = await sandbox.run(command.split()[0], SEC)
            assert (wrong.stdout, wrong.stderr, wrong.exit_code) == ('', line, 2)
            rewards = [(await sandbox.verify()).reward]
            await sandbox.reset()
            await sandbox.solve()
            return [*rewards, (await sandbox.verify()).reward]

    assert asyncio.run(main(tasks[1])) == [0.0, 1.0]


def test_all_tasks_of_a_seed_are_on_one_machine():
    tools = tools_of('train', 0)
    assert len(tools) == 24 and set(tools) <= set(WORDS['train'])
    assert tools == tools_of('train', 5) == tools_of('heldout', 4)
    assert tools != tools_of('train', 0, seed=SEED + 1)
    # So many options that a guess is rarely right.
    assert max(collections.Counter(tools.values()).values()) <= 5
    texts = [draft_task(SEED, 'train', i, FAMILIES)[1].instruction for i in range(60)]
    named = re.findall(r'[a-z]{4}', ' '.join(text.partition(' with ')[2] for text in texts))
    assert set(named) - {'then'} == set(tools)


def test_a_new_machine_is_another_one_in_every_task():
    first, second = (tools_of('train', index, 'new_machine') for index in range(2))
    assert len(first) == len(second) == 24 and len(set(first) & set(second)) < 3
    assert not set(first) & set(tools_of('train', 0))


def test_files_of_the_splits_differ():
    for split in WORDS:
        for index in range(30):
            _, draft = draft_task(SEED, split, index, FAMILIES)
            assert {path.removesuffix('.txt') for path in draft.files} <= set(WORDS[split])


def sessions(count: int = 600) -> list:
    return [draft_task(SEED, 'explore', index, FAMILIES)[1] for index in range(count)]


def test_no_session_names_a_tool_of_the_tasks_machine(tmp_path):
    tools = set(tools_of('train', 0))
    for session in sessions(2000):
        text = [session.instruction, *session.files, *session.files.values(), *session.commands]
        assert not tools & set(re.findall(r'[a-z]+', ' '.join([*text, *session.tools])))
    # And nothing else does on disk, the scripts and the tests included.
    folder = tmp_path / 'sessions'
    generate_tasks(folder, split='explore', count=30, seed=SEED, families=FAMILIES)
    files = [file for file in pathlib.Path(folder).rglob('*') if file.is_file()]
    words = set(re.findall(r'[a-z]+', ' '.join(f'{f} {f.read_text()}' for f in files)))
    assert len(files) > 150 and not tools & words


def test_sessions_know_one_machine_and_guess_on_others():
    known, first_right, slips = collections.Counter(), collections.Counter(), 0
    found = sessions()
    met = collections.Counter(name for session in found for name in session.tools)
    for session in found:
        # Three in five sessions are on 40 tools, so each of these is met some 18 times.
        is_known = min(met[name] for name in session.tools) > 6
        known[is_known] += 1
        asked = re.findall(r'[a-z]{4}', session.instruction.partition(' with ')[2])
        tools = [name for name in asked if name != 'then']
        assert set(tools) == set(session.tools)
        slips += session.commands[0].split()[0] not in tools or (
            session.commands[0].split()[2] not in session.files
        )
        for name in tools:
            option = re.search(r'== -(.) ', session.tools[name])[1]
            file = next(iter(session.files))
            calls = [c for c in session.commands if re.fullmatch(f'{name} -. {file}', c)]
            # At most one guess, then as the usage line says.
            assert calls[-1] == f'{name} -{option} {file}' and len(calls) <= 2
            first_right[is_known, len(calls) == 1] += 1
    assert abs(known[True] / len(found) - 0.6) < 0.06
    for is_known, share in ((True, 0.8), (False, 0.1)):
        right, wrong = first_right[is_known, True], first_right[is_known, False]
        assert abs(right / (right + wrong) - share) < 0.05
    assert abs(slips / len(found) - 0.2) < 0.05
    assert len([name for name, count in met.items() if count > 6]) == 40


@pytest.mark.slow
def test_a_session_prints_what_tools_print_and_earns_nothing(tmp_path, run):
    kinds = ('usage: ', ': command not found', ': No such file or directory')
    seen = collections.Counter()
    folder = tmp_path / 'sessions'
    generate_tasks(folder, split='explore', count=40, seed=SEED, families=FAMILIES)
    for session in load_tasks(folder):
        commands = [command for _, command, _ in demonstration(session) if command]
        for command, after in zip(commands, [*commands[1:], '']):
            printed, reward = run(session, command)
            assert reward == '0'
            seen[next((kind for kind in kinds if kind in printed), printed)] += 1
            if printed.startswith('usage'):
                name = command.split()[0]
                option = re.fullmatch(rf'usage: {name} (-.) FILE\n', printed)[1]
                assert after.startswith(f'{name} {option} ')
    assert seen.keys() == {'', *kinds}  # a right call prints nothing


def test_thoughts_and_usage(tasks, tmp_path):
    command = demonstration(tasks[1])[0][1]
    name, option, _ = command.split()
    assert usage(tasks[1]) == (command, f'usage: {name} {option} FILE\n')
    assert [turn[0] for turn in demonstration(tasks[1])] == ['Seal it.', 'Seal it.', 'Done.']
    generate_tasks(tmp_path / 'set', split='train', count=1)
    assert usage(load_task(tmp_path / 'set' / 'train-00000-copy')) is None
