"""Steps from the groups that are whole, on real stores, with a thread in the place of workers."""

import collections
import json
import random
import threading
import time

import ml_collections
import numpy as np
import pytest

from configs import base
from echo_jax.run.ahead import InFlight, Ledger
from echo_jax.run.arrivals import Arrivals
from echo_jax.run.entry import Stop
from echo_jax.run.numbering import Steps
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Claims
from echo_jax.store.due import DueStore
from echo_jax.store.kvstore import open_kvstore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Task
from tests.support.buckets import serving
from tests.support.groups import small_group
from tests.support.small_run import wait_for

TASKS = [Task(f'task-{i}', None, '') for i in range(200)]


def recipe(groups=2, staleness=2, **batch) -> ml_collections.FrozenConfigDict:
    c = base.get_config()
    c.policy.backend = 'vllm'
    c.max_staleness = staleness
    c.batch.groups, c.group_size = groups, 2
    c.batch.update(batch)
    return ml_collections.FrozenConfigDict(c)


class Run:
    """A learner without its learning: it draws steps, and the version is the number of steps."""

    def __init__(self, folder, config, steps=12):
        self.work = Workdir(folder, config)
        self.store = RolloutStore(self.work.url('rollouts', 'train'))
        self.due = DueStore(self.work.url('fleet'))
        self.steps, self.done = steps, 0
        self.start()

    def start(self, state=None, done=0):
        """A process that starts; `state` is of the checkpoint at `done`."""
        ledger, config = Ledger(self.work), self.work.config
        self.arrivals = Arrivals(self.work, Stop(), lambda: None)
        self.ahead = InFlight(TASKS, self.arrivals, config, self.steps, ledger)
        self.done = done
        self.due.clear()
        if state:
            self.ahead.set_state(state)

    def step(self) -> tuple[list[int], dict[str, float]]:
        rollouts, values = self.ahead.draw(self.done)
        oldest = min(r.policy_versions.max() for r in rollouts)
        assert 0 <= self.done - oldest <= self.work.config.max_staleness
        self.ahead.trained()
        self.done += 1
        return sorted({r.group_id for r in rollouts}), values

    def wanted(self) -> list[int]:
        """The groups that workers have to draw, by number."""
        ids = sorted(i for due in self.due.listed() for i in due.group_ids)
        return self.store.missing(ids)

    def write(self, *group_ids: int, version: int | None = None) -> None:
        tasks = dict(pair for due in self.due.listed() for pair in due.assignments)
        for i in (i for i in group_ids if i in tasks):  # others are due no longer
            version = self.done if version is None else version
            self.store.write_group(small_group(i, tasks[i], version))


def draw_as(
    name: str, run: Run, ended: threading.Event, dice: random.Random, slow_sec: float = 0.0
) -> None:
    """A worker: it claims groups and writes them. One in four takes `slow_sec`."""
    claims = Claims(run.due.url, name, lease_sec=2.0)
    while not ended.is_set():
        for due in run.due.listed():
            for i, task_id in due.assignments:
                version = run.done
                if run.store.missing([i]) and claims.take((due.store, i), version):
                    if dice.random() < 0.25:
                        time.sleep(slow_sec)
                    run.store.write_group(small_group(i, task_id, version))
                    claims.release((due.store, i))
        claims.renew()
        time.sleep(dice.random() * 0.02)


def begun(run: Run) -> None:
    """Lets the run post what its first step wants, which the test then draws."""
    run.ahead.post(run.done)


def test_a_step_takes_the_oldest_groups_that_are_whole(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    assert run.wanted() == [0, 1, 2, 3, 4, 5]  # three steps' worth
    run.write(1, 5, 3)
    assert run.step()[0] == [1, 3]
    begun(run)
    assert run.wanted() == [0, 2, 4, 6, 7]  # as many new ones as a step has taken; 5 is there
    run.write(7, 2)
    counts = {'late_groups': 0, 'waiting_groups': 1, 'in_flight_groups': 4}  # of 2, 5, 7, 0, 4, 6
    assert run.step() == ([2, 5], {f'rollout/{name}': n for name, n in counts.items()})


def test_what_is_too_old_is_dropped_and_replaced(tmp_path, capsys):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    for _ in range(3):
        begun(run)
        run.write(*run.wanted()[1:3])  # group 0 is slow
        run.step()
    run.write(0, version=0)  # and whole when step 4 of weights 3 is due
    begun(run)
    run.write(*run.wanted()[:3])
    groups, values = run.step()
    assert 0 not in groups and values['rollout/late_groups'] == 1
    assert 'groups 0 came too late and are dropped' in ' '.join(capsys.readouterr().out.split())
    begun(run)
    in_flight = run.wanted() + [i for i in run.store.groups() if Steps(run.work.config)[i] is None]
    steps = Steps(run.work.config)
    steps.read(open_kvstore(run.work.url()))
    assert steps.is_known(0) and steps[0] is None and steps[groups[0]] == 4
    assert len([i for i in set(in_flight) if not steps.is_known(i)]) == 6


def test_a_group_that_is_bound_to_be_too_old_is_not_waited_for(tmp_path):
    run = Run(tmp_path / 'run', recipe(staleness=1))
    begun(run)
    worker = Claims(run.due.url, 'worker', lease_sec=0.01)
    assert worker.take(('train', 0), 0)
    for _ in range(2):
        run.write(*run.wanted()[1:3])
        run.step()
        begun(run)
    run.write(*run.wanted()[1:3])
    _, values = run.step()
    assert values['rollout/late_groups'] == 1 and 0 not in run.wanted()
    time.sleep(0.02)
    assert worker.renew() == {('train', 0)}  # so the worker gives it up


@pytest.mark.parametrize('stragglers, second', [('drop', [6, 7]), ('wait', [2, 3])])
def test_a_step_waits_for_what_would_get_too_old(tmp_path, stragglers, second):
    run = Run(tmp_path / 'run', recipe(stragglers=stragglers))
    begun(run)
    worker = Claims(run.due.url, 'worker', lease_sec=60)
    assert all(worker.take(('train', i), 0) for i in run.wanted())
    run.write(0, 1)
    assert run.step()[0] == [0, 1]
    begun(run)
    run.write(6, 7)  # of version 1
    # Of version 0 there are four, and only the third step can still take two of them.
    writer = threading.Timer(0.5, run.write, [2, 3], dict(version=0))
    writer.start()
    assert run.step()[0] == second
    writer.join()
    begun(run)
    run.write(4, 5, version=0)
    run.write(8, 9)
    groups, values = run.step()
    assert (groups, values['rollout/late_groups']) == (
        [4, 5] if stragglers == 'wait' else [2, 3],
        0,
    )
    begun(run)
    run.write(*run.wanted())
    assert run.step()[1]['rollout/late_groups'] == (0 if stragglers == 'wait' else 2)


@pytest.mark.parametrize('staleness', [1, 2])
def test_a_run_that_waits_drops_nothing(tmp_path, staleness):
    config = recipe(staleness=staleness, groups=3, stragglers='wait')
    run, ended = Run(tmp_path / 'run', config, steps=10), threading.Event()
    workers = [
        threading.Thread(target=draw_as, args=(f'w-{i}', run, ended, random.Random(i), 0.3))
        for i in range(4)
    ]
    try:
        begun(run)
        for worker in workers:
            worker.start()
        steps = [run.step() for _ in range(run.steps)]
    finally:
        ended.set()
        for worker in workers:
            worker.join()
    assert sorted(i for groups, _ in steps for i in groups) == [*range(30)]
    assert all(values['rollout/late_groups'] == 0 for _, values in steps)


def test_a_deadline_drops_what_takes_too_long(tmp_path):
    run = Run(tmp_path / 'run', recipe(staleness=0, oversample=1, deadline_sec=0.3))
    begun(run)
    assert run.wanted() == [0, 1, 2]
    worker = Claims(run.due.url, 'worker', lease_sec=60)
    assert worker.take(('train', 0), 0) and worker.take(('train', 1), 0)
    writer = threading.Timer(1.0, run.write, [2, 3])
    writer.start()
    groups, values = run.step()
    writer.join()
    assert groups == [2, 3] and values['rollout/late_groups'] == 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize('seed', range(6))
def test_killed_at_any_time_every_group_is_trained_on_once(tmp_path, seed):
    """Processes end between any two lines of a step and go on from the last checkpoint."""
    random_ = random.Random(seed)
    run = Run(tmp_path / 'run', recipe(oversample=1))
    saved, trained = (None, 0), {}
    ended = threading.Event()

    def draw():
        while not ended.is_set():
            wanted = run.wanted()
            if wanted:
                age = random_.randint(0, 3)
                run.write(random_.choice(wanted), version=max(run.done - age, 0))
            time.sleep(0.001)

    worker = threading.Thread(target=draw)
    worker.start()
    try:
        while run.done < run.steps:
            state = run.ahead.get_state()
            if random_.random() < 0.4:
                saved = (state, run.done)
            if random_.random() < 0.3:
                run.start(*saved)
            if random_.random() < 0.2:  # killed between drawing and the checkpoint
                run.ahead.draw(run.done)
                run.start(*saved)
            number, (groups, _) = run.done, run.step()
            assert trained.setdefault(number, groups) == groups  # the same again
    finally:
        ended.set()
        worker.join()
    counts = collections.Counter(i for groups in trained.values() for i in groups)
    assert set(counts.values()) == {1} and len(trained) == run.steps
    steps = Steps(run.work.config)
    steps.read(open_kvstore(run.work.url()))
    assert {i: steps[i] for i in counts} == {
        i: number + 1 for number, groups in trained.items() for i in groups
    }


def test_a_run_that_has_come_to_its_end_is_made_longer(tmp_path):
    run, trained = Run(tmp_path / 'run', recipe(), steps=3), []
    for steps in (3, 6):
        run.steps = steps
        run.start(run.ahead.get_state(), run.done)
        while run.done < run.steps:
            begun(run)
            run.write(*run.wanted())
            trained += run.step()[0]
        begun(run)
        assert not run.wanted()
    assert trained == list(range(12))
    rows = [json.loads(row) for row in (run.work.path / 'groups.jsonl').read_text().splitlines()]
    assert [(row['step'], row['dropped']) for row in rows] == [(n, []) for n in range(1, 7)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bucket_that_fails_stalls_and_forgets_to_answer(tmp_path, monkeypatch):
    """One request in ten gets a 503, half of those after the server has done what it asks."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    with serving('--unreliable=0.1', '--stall=5') as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        run, ended = Run('gs://bucket/run', recipe(staleness=1), steps=6), threading.Event()
        workers = [
            threading.Thread(target=draw_as, args=(f'worker-{i}', run, ended, random.Random(i)))
            for i in range(2)
        ]
        try:
            begun(run)
            for worker in workers:
                worker.start()
            taken = [i for _ in range(run.steps) for i in run.step()[0]]
        finally:
            ended.set()
            run.arrivals.close()  # its thread asks the server, which goes away below
            for worker in workers:
                worker.join()
        groups = run.store.read_groups(taken)
    assert len(taken) == len({*taken}) == run.steps * 2
    assert [group[0].group_id for group in groups] == taken
    assert [len(group) for group in groups] == [2] * len(taken)


def test_a_row_that_was_not_written_to_its_end_counts_for_nothing(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    run.write(0, 1)
    run.step()
    file = run.work.path / 'groups.jsonl'
    file.write_text(file.read_text() + '{"step": 2, "gro')
    run.start()
    run.write(2, 3)
    assert run.step()[0] == [0, 1]
    run.write(*run.wanted()[:2])
    run.step()
    assert [row['step'] for row in map(json.loads, file.read_text().splitlines())] == [1, 2]


def damage(run: Run, group_id: int) -> None:
    file = run.work.path / 'rollouts' / 'train' / 'groups' / f'{group_id:012d}'
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('moment', ['before the step', 'while another is learned', 'on a resume'])
def test_a_damaged_group_is_set_aside_and_drawn_anew(tmp_path, caplog, moment):
    run = Run(tmp_path / 'run', recipe(staleness=1))
    begun(run)
    state = run.ahead.get_state()
    if moment == 'before the step':
        run.write(0, 1)
        damage(run, 0)
        run.write(2)
        assert run.step()[0] == [1, 2]
    else:
        run.write(1, 2, 3) if moment == 'on a resume' else run.write(1, 2)
        assert run.step()[0] == [1, 2]  # its learning is not over yet
        if moment == 'on a resume':
            damage(run, 1)
            run.start(state)
            anew = threading.Timer(0.5, lambda: run.write(1, version=0))
            anew.start()
            assert run.step()[0] == [1, 2]  # as the ledger says
            anew.join()
        else:
            begun(run)
            run.store.write_group(small_group(0, 'task-0', 0)[:1])
            damage(run, 0)
            wait_for(lambda: 0 in run.wanted())
    name = '000000000001' if moment == 'on a resume' else '000000000000'
    assert (run.work.path / 'rollouts' / 'train' / 'aside' / name).exists()
    wait_for(lambda: 'drawn anew' in caplog.text)  # a thread may be about to say so
    assert 'is corrupt' in caplog.text
    if moment != 'on a resume':
        begun(run)
        assert 0 in run.wanted()
        run.write(0)
        run.write(*run.wanted()[:1])
        assert 0 in run.step()[0]


def test_what_arrives_while_a_step_is_learned_is_read_at_once(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    run.write(0, 1)
    run.ahead.draw(run.done)
    run.write(2, 3)
    file = run.work.path / 'rollouts' / 'train' / 'groups' / '000000000003'
    wait_for(lambda: len(run.arrivals.held) == 2)
    file.unlink()  # nobody reads it again
    run.ahead.trained()
    run.done += 1
    assert run.step()[0] == [2, 3]


def test_weights_that_a_worker_finds_damaged_go_out_again(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    weights = WeightStore(run.work.url('weights'))
    arrays = {'a': np.ones(3, np.float32)}
    weights.publish(arrays, 0)
    again = []

    def publish_again():
        weights.rewind(-1)
        weights.publish(arrays, 0)
        again.append(weights.newest())
        run.write(0, 1)

    run.arrivals.publish_again = publish_again
    begun(run)
    first = weights.newest()
    run.due.report('worker', {'version': 0, 'drawing': 0, 'damaged': first[1]})
    assert run.step()[0] == [0, 1]
    assert len(again) == 1 and again[0] != first  # the report that is left is of the old ones
