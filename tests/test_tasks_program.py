"""python -m echo_jax.tasks as a process: what it lists, packs, finds fault with and builds."""

import asyncio
import json
import os
import shutil
import signal

import pytest

from configs.tiny import get_config
from echo_jax.run import oracle
from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.tasks.generate import FAMILIES, generate_tasks
from echo_jax.tasks.sources import load_tasks
from echo_jax.types import Status
from tests.support import habits
from tests.support.harbor_habits import HABITS
from tests.support.small_run import SETTINGS, config_flags, wait_for
from tests.support.task_folders import write

TINY = '--config=configs/tiny.py'


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
    """A task of every family."""
    folder = tmp_path_factory.mktemp('tasks') / 'set'
    return generate_tasks(folder, split='train', count=len(FAMILIES), seed=5)


def says(programs, *flags, code=0) -> list[str]:
    done = programs.run('tasks', *flags, COLUMNS='300')
    assert done.returncode == code and done.stderr == '', (done.returncode, done.stderr)
    return done.stdout.splitlines()


def test_lists_packs_and_counts_what_fits(programs, tasks, tmp_path):
    file, run = tmp_path / 'set.parquet', tmp_path / 'run'
    lines = says(programs, f'--tasks={tasks}', f'--parquet={file}')
    runs = [f'  {backend}: 10 of 10' for backend in ('local', 'docker', 'harbor')]
    assert lines == [f'{tasks}: 10 tasks', *runs, f'10 tasks packed into {file}']
    # With a run: its own tokenizer counts prompts, and it keeps what was unpacked.
    flags = [TINY, f'--workdir={run}', *config_flags(SETTINGS)]
    lines = says(programs, *flags, f'--tasks={file}:environment_only')
    assert lines[0] == f'{file}: 10 tasks, environment only'
    assert lines[-1] == '0 prompts over 200 tokens dropped'
    assert len([p for p in (run / 'tasks' / 'unpacked').iterdir() if p.is_dir()]) == 10
    lines = says(programs, *flags)
    assert [line for line in lines if not line.startswith(' ')] == [
        'train: 40 tasks',
        'heldout: 6 tasks',
        '0 prompts over 200 tokens dropped',
    ]


def test_says_what_can_run_where_and_why_not(programs, tasks, tmp_path):
    folder = shutil.copytree(tasks, tmp_path / 'checkout' / 'sets' / 'one')
    for habit in HABITS:
        if habit.needs or habit.name == 'image-user':
            habits.write(habit, tmp_path / 'checkout' / 'sets' / 'two')
    write(folder / 'unreadable', '[environment')
    write(folder / 'new', '[environment]\nfuture = 1\n')
    output = tmp_path / 'rows.json'
    lines = says(programs, f'--tasks={tmp_path}/checkout', f'--output={output}')
    assert lines[0] == f'{tmp_path}/checkout: 15 tasks, 1 left out'
    assert lines[1].startswith('  unreadable: ') and 'is not TOML' in lines[1]
    assert lines[2] == '  not known to Harbor, which reads past them: [environment] future (1)'
    assert '  docker: 12 of 15' in lines and '  harbor: 15 of 15' in lines
    assert "    not 1: needs [[steps]]; sandbox.backend='harbor' runs it" in lines
    assert '  local: 11 of 15' in lines and any('USER' in line for line in lines)
    rows = {row['task_id']: row for row in json.loads(output.read_text())['tasks']}
    assert len(rows) == 16 and rows['unreadable']['path'] is None
    assert rows['new']['refused'] == {'local': '', 'docker': '', 'harbor': ''}
    assert 'USER' in rows['image-user']['refused']['local']
    assert rows['image-user']['refused']['docker'] == ''
    lines = says(programs, f'--tasks={tmp_path}/checkout', '--verbose')
    assert any(line.startswith('    image-user: ') and 'USER' in line for line in lines)


def test_a_check_names_the_tasks_that_are_wrong(programs, tasks, tmp_path):
    folder = shutil.copytree(tasks, tmp_path / 'set')
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    (folder / names[0] / 'solution' / 'solve.sh').write_text('echo no\n')
    shutil.rmtree(folder / names[1] / 'solution')
    test = folder / names[2] / 'tests' / 'test.sh'
    test.write_text('echo 0.75 > /logs/verifier/reward.txt\n')
    dockerfile = folder / names[3] / 'environment' / 'Dockerfile'
    dockerfile.write_text('FROM x\nVOLUME /data\n')
    lines = says(programs, TINY, f'--tasks={folder}', '--check', code=1)
    (first,) = (line for line in lines if line.startswith(f'{names[0]}: its solution earns 0 (ok)'))
    end = lines[lines.index(first) :]
    assert first.endswith('printed at the end: no')
    assert end[1].startswith(f'{names[1]}: {folder}/{names[1]}/solution/solve.sh is missing')
    assert end[2].startswith(f'{names[3]}: {dockerfile}:2: VOLUME is not followed by the local')
    assert end[3:5] == [
        '3 of 10 tasks where oracle is wrong',
        f'{names[2]}: doing nothing earns 0.75',
    ]
    assert end[5].startswith(f'{names[3]}: ') and end[6:] == ['2 of 10 tasks where nop is wrong']
    assert not programs.alive()


def test_mistakes_are_one_line(programs, tasks, tmp_path):
    fails = lambda *flags: programs.fails('tasks', *flags)  # noqa: E731
    assert 'no tasks named; give --tasks' in fails()
    assert '--build and --check go by a recipe; give its --config' in fails(
        f'--tasks={tasks}', '--check'
    )
    line = fails(TINY, f'--tasks={tasks}', '--build')
    assert "images for sandbox.backend='docker', which is 'local'" in line
    (tmp_path / 'bad.parquet').write_text('no parquet')
    line = fails(f'--tasks={tmp_path}/bad.parquet')
    assert 'bad.parquet cannot be read, or is no parquet file' in line


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sandboxes(programs, tasks, tmp_path, number):
    folder = shutil.copytree(tasks, tmp_path / 'set')
    for script in folder.glob('*/solution/solve.sh'):
        script.write_text('sleep 1000\n')
    process = programs.start('tasks', TINY, f'--tasks={folder}', '--check')
    try:
        # Ten sandboxes: its process on the host, and process 1.
        wait_for(lambda: len(programs.alive()) > 20 or process.poll() is not None)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (1, 'stopped\n'), stdout
    wait_for(lambda: not programs.alive())


# ------------------------------------------------------------------------ sandboxes that fail
def check(tasks, make_sandbox, **options):
    options |= {'at_once': 2, 'retry_after': (0.0, 0.0)}
    run = oracle.run_without_model(tasks, make_sandbox, **options)
    return asyncio.run(run)


def test_failed_sandboxes_are_retried_then_recorded(tasks):
    """Real sandboxes; the first of one task, and all of another, are killed as they start."""
    make, made = sandbox_maker(get_config()), []
    first, second, third, *_ = load_tasks(tasks)

    def killing(task):
        sandbox = make(task)
        made.append(task.task_id)
        if task is second or (task is first and made.count(task.task_id) == 1):
            start = sandbox.start

            async def start_and_die():
                await start()
                os.kill(sandbox._process.pid, signal.SIGKILL)
                raise SandboxError('the sandbox\ndied')

            sandbox.start = start_and_die
        return sandbox

    outcomes, seen = [first, second, third], []
    outcomes = check(outcomes, killing, oracle=True, samples=2, on_outcome=seen.append)
    assert [(o.task_id, o.sample_id) for o in outcomes] == [
        (t.task_id, i) for t in (first, second, third) for i in range(2)
    ]
    assert sorted(seen) == sorted(outcomes)
    lost = [o for o in outcomes if o.task_id == second.task_id]
    assert {(o.reward, o.status, o.reason) for o in lost} == {
        (0.0, Status.INFRA_ERROR, 'the sandbox died')
    }
    assert {(o.reward, o.status, o.reason) for o in outcomes if o not in lost} == {
        (1.0, Status.OK, '')
    }
    assert made.count(second.task_id) == 6 and made.count(first.task_id) == 3


def test_a_solution_has_the_agents_time(tasks, tmp_path):
    (name, *_) = (t.task_id for t in load_tasks(tasks))
    task = shutil.copytree(tasks / name, tmp_path / 'set' / name)
    toml = (task / 'task.toml').read_text()
    (task / 'task.toml').write_text(toml.replace('timeout_sec = 60.0', 'timeout_sec = 0.5'))
    with (task / 'solution' / 'solve.sh').open('a') as script:
        script.write('sleep 1000\n')
    # The work was done in time, and is verified; that the script did not end is said.
    (outcome,) = check(load_tasks(tmp_path / 'set'), sandbox_maker(get_config()), oracle=True)
    assert outcome[:5] == (name, 0, 1.0, Status.AGENT_TIMEOUT, '')


# ----------------------------------------------------------------------------------- with Docker
def test_images_are_built_once_and_the_check_holds_in_docker(programs, daemon, tasks, tmp_path):
    folder = shutil.copytree(tasks, tmp_path / 'set')
    flags = [TINY, '--config.sandbox.backend=docker', '--config.sandbox.at_once=4']
    flags += ['--config.sandbox.memory_mb=128', f'--tasks={folder}']
    environment = dict(DOCKER_HOST=daemon.url, COLUMNS='300')
    done = programs.run('tasks', *flags, '--build', '--check', **environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert '0 of 10 tasks without an image' in done.stdout
    assert '0 of 10 tasks where oracle is wrong' in done.stdout
    assert '0 of 10 tasks where nop is wrong' in done.stdout
    broken = sorted(p for p in folder.iterdir() if p.is_dir())[0]
    (broken / 'environment' / 'Dockerfile').write_text('FROM debian:bookworm-slim\nRUN exit 3\n')
    done = programs.run('tasks', *flags, '--build', **environment)
    assert done.returncode == 1 and '1 of 10 tasks without an image' in done.stdout, done
    assert f'{broken.name}: ' in done.stdout


def test_no_engine_is_one_line(programs, tasks, tmp_path):
    pytest.importorskip('docker', reason='the Docker SDK is not installed')
    flags = [TINY, '--config.sandbox.backend=docker', f'--tasks={tasks}', '--build']
    line = programs.fails('tasks', *flags, DOCKER_HOST=f'unix://{tmp_path}/no.sock')
    assert 'no Docker engine answers' in line and "to 'local'" in line
