"""The learner's program as a process: whole, killed at any moment, stopped, misused."""

import itertools
import json
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import time

import matplotlib.image
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from configs.tiny import get_config
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import generate_tasks
from echo_jax.types import Role, Status
from tests.support.small_run import (
    HELDOUT,
    NO_WARM_START,
    SETTINGS,
    SUMMARY,
    metrics,
    summary,
    wait_for,
)
from tests.support.task_folders import write

STEPS = SETTINGS['num_steps']
GROUPS = SETTINGS['batch']['groups']


@pytest.fixture(scope='module')
def repeated(programs, finished, tmp_path_factory) -> tuple[pathlib.Path, float]:
    """The same run in another process, with everything compiled: its workdir and seconds."""
    workdir, started = tmp_path_factory.mktemp('repeated') / 'run', time.monotonic()
    programs.train(workdir)
    return workdir, time.monotonic() - started


def same(workdir: pathlib.Path, reference: pathlib.Path) -> bool:
    """Whether two runs did the same, to the last bit of every number but seconds."""
    assert metrics(workdir) == metrics(reference)
    assert summary(workdir) == summary(reference)
    return True


def groups(workdir: pathlib.Path, name: str = 'train') -> int:
    folder = workdir / 'rollouts' / name / 'groups'
    return len(list(folder.glob('[0-9]' * 12))) if folder.exists() else 0


def checkpoints(workdir: pathlib.Path, name: str = 'train') -> list[int]:
    folder = workdir / 'checkpoints' / name
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())


# ------------------------------------------------------------------------------------ a whole run


def test_summary(finished):
    document = json.loads((finished / 'summary.json').read_text())
    assert tuple(name for name in document if 'output' not in name) == SUMMARY
    assert 0 <= document['imagined_before'] <= 1 and 0 <= document['imagined_after'] <= 1
    assert document['steps'] == STEPS
    assert document['rollouts'] == STEPS * GROUPS * SETTINGS['group_size']
    assert 0 <= document['solve_rate_before'] <= 1 and 0 <= document['solve_rate_after'] <= 1
    # An untrained model over 400 tokens is near log 400 = 5.99 nats; ECHO's term brings it down.
    assert 4 < document['env_ce_after'] < document['env_ce_before'] < 6.5
    assert document['train_minutes'] > 0


def test_metrics(finished):
    rows = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert {key.partition('/')[0] for key in row} <= {
            *('step', 'train', 'rollout', 'eval', 'time', 'system')
        }
        assert {'train/loss', 'train/env_ce', 'rollout/reward', 'time/sampling'} <= row.keys()
        assert all(np.isfinite(value) for value in row.values())
        assert row['rollout/staleness'] == row['rollout/status/infra_error'] == 0
        # The sampler and the learner agree on what the policy said, to float32's rounding.
        assert 0 < row['train/logprob_gap'] < 1e-5
        config = get_config()
        assert row['train/loss'] == pytest.approx(
            row['train/policy_loss'] + config.loss.env_coef * row['train/env_loss'], rel=1e-5
        )
    assert [row['step'] for row in rows if 'train/grad_norm_env' in row] == [1, 2, 4, STEPS]
    measured = {row['step']: row['eval/env_ce'] for row in rows if 'eval/env_ce' in row}
    assert list(measured) == [2, 4]  # every 2 steps, but for the last, which the summary holds
    for row in rows:
        roles = {name for name in row if name.startswith('eval/env_ce/')}
        assert bool(roles) == ('eval/env_ce' in row)
        # Of loss.targets 'released', these three make the whole.
        means = [row[name] for name in roles - {'eval/env_ce/warning'}]
        assert not means or min(means) <= row['eval/env_ce'] <= max(means)
    # Of the weights of the steps before.
    drawn = {row['step']: row['eval/version'] for row in rows if 'eval/solve_rate' in row}
    assert drawn == {3: 2, 5: 4}
    before, after = (summary(finished)[f'env_ce_{when}'] for when in ('before', 'after'))
    assert after < measured[4] < measured[2] < before


def test_stores_hold_whole_groups(finished):
    store = RolloutStore(finished / 'rollouts' / 'train')
    ids = store.groups()
    assert ids == list(range(STEPS * GROUPS))
    drawn = store.read_groups(ids)
    for group_id, group in zip(ids, drawn):
        assert [r.sample_id for r in group] == list(range(SETTINGS['group_size']))
        assert len({r.task_id for r in group}) == 1
        for rollout in group:
            acting = rollout.roles == Role.ACTION
            assert acting.any()
            # max_staleness 0: step n samples from version n, which n updates have made.
            assert set(rollout.policy_versions[acting]) == {group_id // GROUPS}
    assert len({group[0].task_id for group in drawn}) == len(ids)  # the first epoch of 40 tasks
    for name in ('heldout_before', 'heldout_after'):
        heldout = RolloutStore(finished / 'rollouts' / name).read_groups(range(HELDOUT))
        assert all(rollout.task_id.startswith('heldout-') for [rollout] in heldout)


def test_solutions_go_through_their_tasks_in_the_warm_starts_sandboxes(finished):
    shown = RolloutStore(finished / 'rollouts' / 'warm_start_practice').read_groups(range(6))
    habits = get_config().warm_start.habits
    solved = [r for i, [r] in enumerate(shown) if habits[i % len(habits)] == 'solve']
    assert len(solved) >= 2
    assert {r.status for r in solved} == {Status.OK}
    assert all((r.roles == Role.OUTPUT).sum() > 0 for r in solved)
    assert not any(r.metrics['seconds_verifying'] for r in solved)  # nobody reads their reward


def test_tensorboard_has_the_metrics(finished):
    seen = {}
    for file in sorted((finished / 'tensorboard').iterdir()):
        data = file.read_bytes()
        while data:  # records: length, its checksum, content, its checksum
            length = struct.unpack('<Q', data[:8])[0]
            event = Event.FromString(data[12 : 12 + length])
            seen |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            data = data[16 + length :]
    for row in metrics(finished):
        for key in row.keys() - {'step'}:
            assert seen[row['step'], key] == np.float32(row[key])


def test_curves_are_drawn(finished):
    image = matplotlib.image.imread(finished / 'curves.png')
    assert image.shape == (432, 1200, 4)
    left, right = np.split(image[..., :3], 2, axis=1)
    for half in (left, right):
        # White paper, and lines in matplotlib's blue and orange.
        assert (half == 1).mean() > 0.5
        assert (np.abs(half - [0.12, 0.47, 0.71]).max(-1) < 0.02).sum() > 20
        assert (np.abs(half - [1.00, 0.50, 0.05]).max(-1) < 0.02).sum() > 20


def test_only_the_last_checkpoints_stay(finished):
    assert checkpoints(finished) == [STEPS - 2, STEPS]
    assert checkpoints(finished, 'warm_start') == [SETTINGS['warm_start']['steps']]


# ---------------------------------------------------------------------------------- again, exactly


def test_same_seed_same_numbers(finished, repeated):
    workdir, _ = repeated
    assert same(workdir, finished)
    assert metrics(workdir, 'warm_start.jsonl') == metrics(finished, 'warm_start.jsonl')
    ids = range(STEPS * GROUPS)
    one, two = (
        RolloutStore(w / 'rollouts' / 'train').read_groups(ids) for w in (workdir, finished)
    )
    for first, second in zip(itertools.chain(*one), itertools.chain(*two)):
        np.testing.assert_array_equal(first.tokens, second.tokens)
        np.testing.assert_array_equal(first.rollout_logprobs, second.rollout_logprobs)


@pytest.mark.timeout(600)
def test_killed_in_every_part(programs, finished, tmp_path):
    workdir = tmp_path / 'run'
    moments = {
        'tasks': lambda: (workdir / 'tasks' / '.train.partial').exists(),
        'transcripts': lambda: groups(workdir, 'warm_start_explore') and len(programs.alive()) > 1,
        'warm start': lambda: checkpoints(workdir, 'warm_start') == [2],
        'sampling': lambda: groups(workdir) > GROUPS,
        'an evaluation in between': lambda: groups(workdir, 'heldout_000004') >= 1,
        'saving': lambda: any((workdir / 'checkpoints' / 'train').glob('*tmp*')),
        'the last evaluation': lambda: groups(workdir, 'heldout_after') >= 1,
    }
    for moment in moments.values():
        exit_code, _ = programs.interrupt(workdir, signal.SIGKILL, moment)
        assert exit_code == -signal.SIGKILL
        assert not (workdir / 'summary.json').exists()
    programs.train(workdir)
    assert same(workdir, finished)
    assert not programs.alive()


@pytest.mark.timeout(600)
def test_killed_at_random(programs, finished, repeated, tmp_path):
    workdir, (_, seconds) = tmp_path / 'run', repeated
    for share in random.Random(0).sample([0.4, 0.5, 0.6, 0.7, 0.8, 0.9], 2):
        process = programs.start('train', *programs.train_flags(workdir))
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        wait_for(lambda: not programs.alive())
    programs.train(workdir)
    assert same(workdir, finished)


@pytest.mark.timeout(600)
def test_stopped_by_signals(programs, finished, tmp_path):
    workdir = tmp_path / 'run'

    def stop(signal_number, moment):
        exit_code, stderr = programs.interrupt(workdir, signal_number, moment)
        assert (exit_code, stderr) == (1, 'stopped; the same command goes on from here\n')

    stop(signal.SIGINT, lambda: groups(workdir, 'warm_start_explore') >= 1)
    assert groups(workdir, 'warm_start_explore') < 6 or groups(workdir, 'warm_start_practice') < 6
    stop(signal.SIGTERM, lambda: groups(workdir) > GROUPS)
    done = len(metrics(workdir))
    assert 0 < done < STEPS and max(checkpoints(workdir)) == done
    stop(signal.SIGINT, lambda: groups(workdir, 'heldout_after') >= 1)
    assert max(checkpoints(workdir)) == STEPS
    programs.train(workdir)
    assert same(workdir, finished)


# ---------------------------------------------------------------------------------------- variants


def test_grpo_is_echo_without_its_term(programs, finished, tmp_path):
    echo, grpo = get_config(), get_config('grpo')
    assert grpo.loss.env_coef == 0 < echo.loss.env_coef
    grpo.loss.env_coef = echo.loss.env_coef
    assert grpo.to_dict() == echo.to_dict()

    programs.train(tmp_path / 'run', variant=':grpo')
    theirs, ours = metrics(tmp_path / 'run'), metrics(finished)
    assert all(row['train/loss'] == row['train/policy_loss'] for row in theirs)
    # The same model draws the first rollouts, and they are measured alike.
    first = {k: v for k, v in ours[0].items() if k not in ('train/loss', 'train/grad_norm')}
    assert first.items() <= theirs[0].items()
    fall = {
        path: (numbers := summary(path))['env_ce_before'] - numbers['env_ce_after']
        for path in (tmp_path / 'run', finished)
    }
    assert fall[finished] > 10 * abs(fall[tmp_path / 'run'])


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    'flags, says',
    [
        (
            ['--config=configs/tiny.py', '--config.nope=1'],
            ['--config.nope=1 names no key', "'nope'"],
        ),
        (['--config=configs/tiny.py', '--config.batch.seq_len=200'], ['seq_len=200', 'raise it']),
        (['--config=configs/tiny.py', '--config.eval.every=0'], ['eval.every is 0']),
        (
            ['--config=configs/tiny.py', '--config.loss.mismatch_cap=2.0'],  # the default
            ['--config.loss.mismatch_cap=2.0 has no effect', "loss.mismatch = 'none'"],
        ),
        (['--config=configs/tiny.py', '--config.mesh.data=2'], ['data=2', '1 devices']),
        (['--config=configs/tiny.py', '--config.policy.backend=torch'], ["'jax' or 'vllm'"]),
        (['--config=configs/tiny.py', '--config.tasks.train=/nowhere'], ['/nowhere']),
    ],
    ids=lambda value: ' '.join(value[-1:]) if isinstance(value, list) else '',
)
def test_a_wrong_flag_is_one_line(programs, tmp_path, flags, says):
    line = programs.fails('train', f'--workdir={tmp_path / "run"}', *flags)
    assert line.startswith('error: ')
    assert [word for word in says if word not in line] == []
    if '/nowhere' not in says:  # the workdir is still any config's
        assert not (tmp_path / 'run').exists()


def test_task_folders_that_hold_no_tasks(programs, tmp_path):
    folder = tmp_path / 'tasks'
    flags = programs.train_flags(
        tmp_path / 'run', f'--config.tasks.train={folder}', without=['tasks.train_count']
    )
    folder.mkdir()
    assert f'{folder} holds no tasks' in programs.fails('train', *flags)
    write(folder / 'bad', toml='[agent')
    assert f'none of 1 tasks can be read: bad ({folder}/bad/task.toml' in programs.fails(
        'train', *flags
    )


def test_bad_tasks_do_not_end_a_run(programs, tmp_path):
    """Of eight tasks one cannot be read, one is not for this sandbox, and one has no sandbox."""
    folder = generate_tasks(tmp_path / 'tasks', split='train', count=8)
    text, compose, user, *_ = tasks = sorted(p for p in folder.iterdir() if p.is_dir())
    (text / 'instruction.md').write_bytes(b'\xff')
    (compose / 'environment' / 'docker-compose.yaml').touch()
    with (user / 'environment' / 'Dockerfile').open('a') as file:
        file.write('USER nobody\n')
    flags = ['--config.num_steps=5', f'--config.tasks.train={folder}', *NO_WARM_START]
    without = ['tasks.train_count', 'warm_start', 'num_steps']
    flags = programs.train_flags(tmp_path / 'run', *flags, without=without)
    done = programs.run('train', *flags)
    assert done.returncode == 0, done.stderr
    assert f'2 of 8 tasks left out: {text.name} (' in done.stderr.replace('\n', ' ')
    groups = RolloutStore(tmp_path / 'run' / 'rollouts' / 'train').read_groups(range(10))
    drawn = [rollout for group in groups for rollout in group]
    assert {r.task_id for r in drawn} == {task.name for task in tasks[2:]}
    for rollout in drawn:
        is_bad = rollout.task_id == user.name
        assert (rollout.status == Status.INFRA_ERROR) == is_bad, rollout.reason
        assert ('USER' in rollout.reason) == is_bad


def test_workdirs_of_others(programs, finished, tmp_path):
    flags = programs.train_flags(finished, '--config.seed=1')
    before = sorted(finished.rglob('*'))
    line = programs.fails('train', *flags)
    assert 'seed is 0 there, 1 here' in line and str(finished) in line
    assert sorted(finished.rglob('*')) == before
    (tmp_path / 'thesis.tex').write_text('precious')
    line = programs.fails('train', *programs.train_flags(tmp_path))
    assert f'{tmp_path} is not empty' in line
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.tex']
    line = programs.fails('train', *programs.train_flags(tmp_path / 'thesis.tex' / 'run'))
    assert 'Not a directory' in line
    line = programs.fails('train', '--config=configs/tiny.py', '--workdir=s3://bucket/run')
    assert 's3://bucket/run: a run lives in a folder or at gs://' in line


def test_a_learner_of_two_processes_has_no_sampler_yet(programs, tmp_path):
    with socket.socket() as free:
        free.bind(('localhost', 0))
        together = {
            'JAX_COORDINATOR_ADDRESS': f'localhost:{free.getsockname()[1]}',
            'JAX_PROCESS_COUNT': '2',
        }
    flags = programs.train_flags(tmp_path / 'run')
    other = programs.start('train', *flags, JAX_PROCESS_ID='1', **together)
    try:
        line = programs.fails('train', *flags, JAX_PROCESS_ID='0', **together)
    finally:
        other.kill()
    assert 'this learner has 2 processes' in line
    assert not (tmp_path / 'run').exists()


def test_no_namespaces(programs, tmp_path):
    line = programs.fails('train', *programs.train_flags(tmp_path / 'run'), PATH=str(tmp_path))
    assert 'bwrap is not installed' in line and 'unshare is not installed' in line
    assert 'install bubblewrap and allow user namespaces' in line
    assert not (tmp_path / 'run').exists()


@pytest.mark.timeout(600)
def test_what_is_damaged_is_named_or_made_again(programs, finished, tmp_path):
    """A checkpoint, which a person has to remove, and a group, which is drawn anew."""
    workdir = shutil.copytree(finished, tmp_path / 'run')
    last = workdir / 'checkpoints' / 'train' / str(STEPS)
    group = max((workdir / 'rollouts' / 'train' / 'groups').iterdir())
    for file in (max((last / 'state').rglob('d/*'), key=lambda path: path.stat().st_size), group):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    line = programs.fails('train', *programs.train_flags(workdir))
    assert f'cannot restore step {STEPS}' in line and f'remove the folder {last}' in line
    shutil.rmtree(last)
    (workdir / 'summary.json').unlink()
    programs.train(workdir)
    assert same(workdir, finished)
    assert (workdir / 'rollouts' / 'train' / 'aside' / group.name).exists()
