"""Generated tasks, run by a real bash: solved is 1; nothing, a wrong answer or a cheat is 0."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from echo_jax.tasks.generate import (
    FAMILIES,
    NUMBERS,
    SYLLABLES,
    WORDS,
    demonstration,
    draft_task,
    generate_tasks,
    practice,
    write_task,
)
from echo_jax.tasks.harbor import load_task
from echo_jax.tasks.sources import load_tasks

PER_SPLIT = 3 * len(FAMILIES)
CASES = [(split, index) for split in ('train', 'heldout') for index in range(len(FAMILIES))]


class Machine:
    """A task's files in a folder, and its verifier with /app and /logs moved there."""

    def __init__(self, root: pathlib.Path, split: str, index: int):
        self.task_id, self.draft = draft_task(7, split, index)
        self.root, self.app, self.task = root, root / 'app', root / self.task_id
        write_task(self.task, 'any', self.draft)
        self.reset()

    def reset(self):
        shutil.rmtree(self.app, ignore_errors=True)
        shutil.copytree(self.task / 'environment' / 'files', self.app)

    def run(self, command: str) -> str:
        done = subprocess.run(['bash', '-c', command], cwd=self.app, capture_output=True, text=True)
        return done.stdout + done.stderr

    def reward(self) -> str:
        script = (self.task / 'tests' / 'test.sh').read_text()
        script = script.replace('cd /app', f'cd {self.app}')
        script = script.replace('/logs/verifier', str(self.root))
        subprocess.run(['bash'], input=script, text=True, cwd='/', check=True)
        text = (self.root / 'reward.txt').read_text()
        (self.root / 'reward.txt').unlink()
        return text.strip()

    def reward_of(self, command: str) -> str:
        self.reset()
        self.run(command)
        return self.reward()


@pytest.fixture(params=CASES, ids=lambda case: draft_task(7, *case)[0])
def machine(request, tmp_path):
    return Machine(tmp_path, *request.param)


def test_demonstration_earns_1_and_nothing_earns_0(machine):
    assert machine.reward() == '0'
    solve = (machine.task / 'solution' / 'solve.sh').read_text()
    assert machine.reward_of(solve) == '1'
    for extra in range(1, 3):  # two more tasks of the family, other words
        index = int(machine.task_id.split('-')[1]) + extra * len(FAMILIES)
        other = Machine(machine.root / str(extra), machine.task_id.split('-')[0], index)
        assert other.reward() == '0'
        assert other.reward_of('\n'.join(other.draft.commands)) == '1'


def test_the_look_tells_what_the_instruction_does_not(machine):
    look, act = machine.draft.commands
    seen = machine.run(look)
    # Every name in the action was read before: in the instruction, or in what the look printed.
    known = set(re.findall(r'[a-z]{4}|\d+', machine.draft.instruction + seen))
    used = set(re.findall(r'[a-z]{4}|\d+', act)) & {
        *WORDS['train'],
        *WORDS['heldout'],
        *map(str, range(100)),
    }
    assert used and used <= known
    assert seen.strip() and not seen.startswith(('grep:', 'cat:', 'ls:'))


def test_any_other_name_in_the_action_earns_0(machine):
    act = machine.draft.commands[-1]
    action = act.split(';')[0]
    names = set(re.findall(r'\b(?:[a-z]{4}|\d+)\b', machine.draft.instruction))
    names &= {*WORDS['train'], *WORDS['heldout'], *NUMBERS['train'], *NUMBERS['heldout']}
    names |= set('23456') if 'count' in machine.task_id else set()
    tried = 0
    for name in sorted(n for n in names if re.search(rf'\b{n}\b', action)):
        for other in sorted(names - {name}):
            tried += 1
            assert machine.reward_of(re.sub(rf'\b{name}\b', other, act)) == '0', (name, other)
    assert tried


@pytest.mark.slow
def test_cheats_and_damage_earn_0(machine):
    solve = '\n'.join(machine.draft.commands)
    results = [path for path, text in machine.draft.changes.items() if text is not None]
    cheats = [f'{solve}\necho more >> {path}' for path in results]
    cheats += [f'{solve}\nmv {path} x; ln -s x {path}' for path in results]
    cheats += [f'{solve}\nrm {path}; mkfifo {path}' for path in results]
    cheats += [f'{solve}\nrm {path}; mkdir {path}' for path in results]
    cheats += [f'{solve}\necho {" ".join(WORDS["train"][:9])} > {path}' for path in results]
    gone = [path for path, text in machine.draft.changes.items() if text is None]
    cheats += [f'{solve}\nmkdir -p $(dirname {path}); ln -s nowhere {path}' for path in gone]
    kept = [path for path in machine.draft.files if path not in machine.draft.changes]
    cheats += [f'{solve}\nrm {path}' for path in kept]
    cheats += [f'{solve}\necho more >> {path}' for path in kept]
    cheats += ['rm -rf *', 'touch out.txt', f'echo {machine.draft.instruction!r} | tee * out.txt']
    for cheat in cheats:
        assert machine.reward_of(cheat) == '0', cheat


def test_another_way_to_the_same_outcome_earns_1(tmp_path):
    machine = Machine(tmp_path, 'heldout', list(FAMILIES).index('copy'))
    source = next(iter(machine.draft.files))
    assert machine.reward_of(f'printf %s "$(cat {source})" > out.txt; touch notes') == '1'


def test_words_of_the_splits_are_disjoint_and_share_syllables():
    assert not set(WORDS['train']) & set(WORDS['heldout'])
    assert not set(NUMBERS['train']) & set(NUMBERS['heldout'])
    assert min(map(len, (*WORDS.values(), *NUMBERS.values()))) >= 10
    for position in (slice(0, 2), slice(2, 4)):
        for split in WORDS:
            assert {word[position] for word in WORDS[split]} == set(SYLLABLES)


@pytest.mark.parametrize('split', ['train', 'heldout', 'explore'])
def test_a_split_uses_its_own_words_alone(split):
    foreign = set(WORDS['train' if split == 'heldout' else 'heldout'])
    for index in range(PER_SPLIT):
        _, draft = draft_task(0, split, index)
        text = '\n'.join([draft.instruction, *draft.files, *draft.files.values(), *draft.commands])
        assert not foreign & set(re.findall(r'\b[a-z]+\b', text))


def test_sets_are_the_same_bytes_every_time_and_differ_by_seed(tmp_path):
    def content(folder):
        return {
            str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mode)
            for p in sorted(folder.rglob('*'))
            if p.is_file()
        }

    first = generate_tasks(tmp_path / 'a', split='train', count=20, seed=3)
    # Another process: no hash seed and no set order may show.
    command = [sys.executable, '-m', 'echo_jax.tasks.generate', '--split=train', '--count=20']
    subprocess.run([*command, '--seed=3', f'--output={tmp_path}/b'], check=True)
    other = generate_tasks(tmp_path / 'c', split='train', count=20, seed=4)
    assert content(first) == content(tmp_path / 'b')
    assert content(first) != content(other)
    # A task does not depend on how many there are.
    assert (first / 'train-00007-folder/instruction.md').read_bytes() == (
        generate_tasks(tmp_path / 'd', split='train', count=8, seed=3)
        / 'train-00007-folder/instruction.md'
    ).read_bytes()


def test_500_tasks_load_and_differ(tmp_path):
    generate_tasks(tmp_path / 'set', split='train', count=500)
    tasks = load_tasks(tmp_path / 'set')
    assert len(tasks) == 500 and len({t.instruction for t in tasks}) >= 495  # names may repeat
    assert max(len(t.instruction.split()) for t in tasks) <= 30


def test_a_killed_generation_is_not_taken_for_a_finished_one(tmp_path):
    output = tmp_path / 'set'
    command = [sys.executable, '-m', 'echo_jax.tasks.generate', '--count=4000']
    process = subprocess.Popen([*command, f'--output={output}'])
    partial = tmp_path / '.set.partial'
    deadline = time.monotonic() + 30
    while not (partial / 'train-00020-copy').exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert partial.exists() and not output.exists()
    generate_tasks(output, split='train', count=30)
    assert len(load_tasks(output)) == 30 and not partial.exists()


def test_a_finished_set_stays_and_another_one_is_refused(tmp_path):
    output = generate_tasks(tmp_path / 'set', split='train', count=5)
    before = os.stat(output / 'generated.json').st_mtime_ns
    generate_tasks(output, split='train', count=5)
    assert os.stat(output / 'generated.json').st_mtime_ns == before
    with pytest.raises(ValueError, match='name a new folder'):
        generate_tasks(output, split='train', count=6)
    (tmp_path / 'mine').mkdir()
    with pytest.raises(ValueError, match='other files'):
        generate_tasks(tmp_path / 'mine', split='train', count=5)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        draft_task(0, 'test', 0)
    with pytest.raises(ValueError, match=r"families \['fly'\] are unknown"):
        draft_task(0, 'train', 0, ('copy', 'fly'))
    with pytest.raises(ValueError, match='count is 0'):
        generate_tasks(tmp_path / 'set', split='train', count=0)


def test_demonstration_is_look_act_done(tmp_path):
    task_id, draft = draft_task(0, 'train', list(FAMILIES).index('delete'))
    write_task(tmp_path / task_id, 'delete', draft)
    task = load_task(tmp_path / task_id)
    look, act = draft.commands
    assert demonstration(task) == [
        ('Look first.', look, False),
        ('Delete it.', act, False),
        ('Done.', None, True),
    ]
    (task.path / 'solution' / 'solve.sh').write_text('#!/bin/bash\n\n')
    with pytest.raises(ValueError, match='no command'):
        demonstration(task)


def test_habits_solve_guess_and_leave(tmp_path):
    task_id, draft = draft_task(0, 'train', list(FAMILIES).index('delete'))
    write_task(tmp_path / task_id, 'delete', draft)
    task = load_task(tmp_path / task_id)
    look, act, done = demonstration(task)
    assert practice(task, 'solve') == [look, act, done]
    assert practice(task, 'guess') == [act, done]
    assert practice(task, 'leave') == [look, done]
    with pytest.raises(ValueError, match="habits names 'nap'"):
        practice(task, 'nap')


def test_sessions_copy_much_earn_nothing_and_repeat(tmp_path):
    copied = total = 0
    for index in range(20):
        machine = Machine(tmp_path / str(index), 'explore', index)
        assert len(machine.draft.commands) == 3
        printed = [machine.run(command) for command in machine.draft.commands]
        assert machine.reward() == '0'
        machine.reset()
        assert printed == [machine.run(command) for command in machine.draft.commands]
        known = machine.draft.instruction
        for command, output in zip(machine.draft.commands, printed):
            words = [w for w in re.findall(r'\b[a-z]{4}\b', output) if w in WORDS['train']]
            total += len(words)
            copied += sum(word in known + command for word in words)
    # The rest stood in an earlier command: the name that a file was moved to, say.
    assert total > 50 and copied / total > 0.9
