"""Rollout groups: exact round trips, what is refused, atomic under SIGKILL and rivals."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from echo_jax.store.kvstore import MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Status
from tests.support.groups import assert_equal, make_group

# Writers are killed by the dozen; a fork server has the imports done once.
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['echo_jax.store.rollouts'])


any_bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack('d', struct.pack('Q', n))[0])


@st.composite
def groups(draw):
    group_id = draw(st.integers(0, 10**12 - 1))
    task_id = draw(st.text(max_size=12))
    group = []
    for sample_id in draw(st.lists(st.integers(-5, 2**40), min_size=1, max_size=4, unique=True)):
        length = draw(st.integers(0, 40))
        bits = hnp.arrays(np.uint32, length)
        turns = st.lists(st.integers(0, length - 1), max_size=5) if length else st.just([])
        group.append(
            Rollout(
                tokens=draw(bits).view(np.int32),
                roles=draw(hnp.arrays(np.uint8, length, elements=st.integers(0, 6))),
                rollout_logprobs=draw(bits).view(np.float32),
                policy_versions=draw(bits).view(np.int32),
                turn_starts=np.array(draw(turns), np.int32),
                reward=draw(any_bits),
                status=draw(st.sampled_from(Status)),
                task_id=task_id,
                group_id=group_id,
                sample_id=sample_id,
                environment_only=draw(st.booleans()),
                metrics=draw(st.dictionaries(st.text(max_size=8), any_bits, max_size=4)),
            )
        )
    return group


@settings(max_examples=150, deadline=None)
@given(groups())
def test_round_trip_is_exact(group):
    store = RolloutStore('memory://')
    assert store.write_group(group)
    [read] = store.read_groups([group[0].group_id])
    assert_equal(read, group)
    for rollout in read:  # the learner may write into what it got
        assert rollout.tokens.flags.writeable


@pytest.mark.parametrize('form', ['path', 'url', 'memory'])
def test_every_kind_of_url(tmp_path, form):
    folder = tmp_path / 'a b%20ü' if form == 'path' else tmp_path / 'plain'
    url = {'path': folder, 'url': f'file://{folder}', 'memory': 'memory://'}[form]
    store = RolloutStore(url)
    assert store.groups() == []
    long = make_group(3, lengths=(34_096, 200))
    for group in (make_group(11), long):
        assert store.write_group(group)
    if form != 'memory':
        assert list((folder / 'groups').iterdir())
        store = RolloutStore(url)
    assert store.groups() == [3, 11]
    first, second = store.read_groups([11, 3])
    assert_equal(first, make_group(11))
    assert_equal(second, long)


def test_group_is_smaller_than_its_arrays(tmp_path):
    """Constant versions, few roles and small token ids: 13 bytes a token go below 8."""
    RolloutStore(tmp_path).write_group(make_group(0, lengths=(8192,) * 4))
    assert (tmp_path / 'groups' / f'{0:012d}').stat().st_size < 8 * 4 * 8192


def test_first_write_wins():
    store = RolloutStore('memory://')
    assert store.write_group(make_group(1, seed=1)) is True
    assert store.write_group(make_group(1, seed=2)) is False
    assert_equal(store.read_groups([1])[0], make_group(1, seed=1))


def test_absent_group_is_one_clear_error(tmp_path):
    store = RolloutStore(tmp_path)
    with pytest.raises(MissingError, match=r'group 4 is not in .*groups\(\)'):
        store.read_groups([4])
    store.write_group(make_group(5))
    with pytest.raises(MissingError, match='group 4'):
        store.read_groups([5, 4])


def test_what_is_missing_comes_in_the_order_asked_for():
    store = RolloutStore('memory://')
    assert store.missing([]) == [] and store.missing([3]) == [3]
    for group_id in (0, 2, 12, 3):
        store.write_group(make_group(group_id))
    assert store.groups() == [0, 2, 3, 12]
    assert store.missing([13, 12, 4, 3, 2]) == [13, 4]
    assert store.missing(iter([11, 0, 1])) == [11, 1]


def broken(**changes):
    group = make_group(1)
    group[2] = dataclasses.replace(group[2], **changes)
    return group


@pytest.mark.parametrize(
    'group, message',
    [
        ([], '0 rollouts'),
        (broken(group_id=2), 'expected group 1'),
        (broken(task_id='other'), "expected group 1 of task 'task-1'"),
        (broken(sample_id=0), 'distinct'),
        (broken(roles=np.zeros(5, np.uint8)), r'roles is uint8 \[5\]; expected uint8 \[1200\]'),
        (broken(tokens=np.zeros(1200)), r'tokens is float64 \[1200\]; expected int32'),
        (broken(roles=np.full(1200, 7, np.uint8)), 'role 7'),
        (broken(turn_starts=np.array([1200], np.int32)), 'turn_starts'),
        (broken(status='no such'), 'no such'),
        (broken(environment_only=1.0), 'environment_only is 1.0; expected a bool'),
    ],
)
def test_what_is_no_group_is_refused(group, message):
    store = RolloutStore('memory://')
    with pytest.raises(ValueError, match=message):
        store.write_group(group)
    assert store.groups() == []


def test_what_a_killed_writer_left_under_the_lock_is_no_part_of_the_next_group(tmp_path):
    store = RolloutStore(tmp_path)
    (tmp_path / 'groups').mkdir()
    left = tmp_path / 'groups' / f'{6:012d}.__lock'  # where TensorStore writes before it renames
    left.write_bytes(os.urandom(1 << 20))
    assert store.groups() == []
    assert store.write_group(make_group(6))
    assert_equal(store.read_groups([6])[0], make_group(6))
    assert store.groups() == [6]


BASE = make_group(0, lengths=(20_000, 5_000))


def numbered(group_id):
    """A group made fast, so that a writer spends its time writing."""
    return [
        dataclasses.replace(
            rollout,
            group_id=group_id,
            tokens=rollout.tokens + group_id,
            metrics={'turns': float(group_id)},
        )
        for rollout in BASE
    ]


def write_forever(url, first, ready):
    store = RolloutStore(url)
    ready.set()
    for group_id in itertools.count(first):
        store.write_group(numbered(group_id))


@pytest.mark.slow
def test_killed_writer_leaves_whole_groups_or_none(tmp_path):
    store, seen = RolloutStore(tmp_path), set()
    rng = np.random.default_rng(0)
    pace = None  # seconds that four groups take on this machine now
    for _ in range(20):
        ready = processes.Event()
        args = (str(tmp_path), max(0, len(seen) - 1), ready)  # repeats one and goes on
        writer = processes.Process(target=write_forever, args=args, daemon=True)
        writer.start()
        assert ready.wait(60)
        start = time.monotonic()
        stop = start + (60 if pace is None else rng.uniform(0, pace))
        while time.monotonic() < stop and (pace or len(seen) < 4):
            check_new(store, seen)  # reads while it writes
        pace = pace or time.monotonic() - start
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        check_new(store, seen)
    assert len(seen) > 4
    assert sorted(seen) == list(range(len(seen)))
    # What the dead left behind is in nobody's way.
    for group_id in range(len(seen) + 2):
        assert store.write_group(numbered(group_id)) is (group_id not in seen)
    check_new(store, seen)


def check_new(store, seen):
    new = sorted(set(store.groups()) - seen)
    for group_id, group in zip(new, store.read_groups(new)):
        assert_equal(group, numbered(group_id))
    seen.update(new)


def write_in_rivalry(url, seed, barrier, won):
    store = RolloutStore(url)
    for group_id in range(30):
        group = make_group(group_id, seed=seed, lengths=(3000,))
        barrier.wait(60)
        if store.write_group(group):
            won.put((group_id, seed))
    won.put(None)


def test_rival_processes_have_one_winner(tmp_path):
    barrier, won = processes.Barrier(3), processes.Queue()
    writers = [
        processes.Process(target=write_in_rivalry, args=args, daemon=True)
        for args in [(str(tmp_path), seed, barrier, won) for seed in range(3)]
    ]
    for writer in writers:
        writer.start()
    results = []
    while results.count(None) < 3:
        results.append(won.get(timeout=60))
    for writer in writers:
        writer.join(60)
    winners = [result for result in results if result is not None]
    assert sorted(group_id for group_id, _ in winners) == list(range(30))
    store = RolloutStore(tmp_path)
    for group_id, seed in winners:
        expected = make_group(group_id, seed=seed, lengths=(3000,))
        assert_equal(store.read_groups([group_id])[0], expected)


def test_store_imports_without_jax():
    script = (
        'import sys, echo_jax.store.rollouts, echo_jax.store.weights; '
        "print(sorted({'jax', 'jaxlib', 'flax', 'torch'} & set(sys.modules)))"
    )
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == '[]', done.stderr
