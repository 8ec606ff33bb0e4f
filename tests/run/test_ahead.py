"""Steps from the groups that are whole, on real stores, with a thread in the place of workers."""

import collections
import json
import random
import threading
import time

import pytest

from echo_jax.run.ahead import Rounds
from echo_jax.run.numbering import Steps
from echo_jax.store.claims import Claims
from echo_jax.store.kvstore import open_kvstore
from echo_jax.store.rollouts import RolloutStore
from tests.support.ahead_run import TASKS, Run, begun, recipe
from tests.support.buckets import serving
from tests.support.groups import small_group
from tests.support.small_run import wait_for


def draw_as(
    name: str, run: Run, ended: threading.Event, dice: random.Random, slow_sec: float = 0.0
) -> None:
    """A worker: it claims groups and writes them. One in four takes `slow_sec`."""
    claims = Claims(run.due.url, name, lease_sec=60.0)
    while not ended.is_set():
        for due in run.due.listed():
            for i, task_id in due.assignments:
                if not run.store.missing([i]):
                    continue
                version = run.done  # as late as can be: the learner goes on meanwhile
                if claims.take((due.store, i), version):
                    if run.done != version:  # the step may have ended without seeing the claim
                        claims.release((due.store, i))
                        continue
                    if dice.random() < 0.25:
                        time.sleep(slow_sec)
                    run.store.write_group(small_group(i, task_id, version))
                    claims.release((due.store, i))
        claims.renew()
        time.sleep(dice.random() * 0.02)


class Source:
    """Draws nothing, and notes with which weights the groups of each step are to be drawn."""

    def __init__(self):
        self.versions: dict[int, int] = {}

    def post(self, due):
        self.versions[due.first_group] = due.version

    def wait(self, due):
        return []


@pytest.mark.parametrize('staleness', [0, 1, 3])
def test_a_resumed_run_draws_ahead_with_the_same_weights(staleness):
    config = recipe(groups=2, staleness=staleness)
    whole, resumed = Source(), Source()
    ahead = Rounds(TASKS, whole, config, 8)
    for done in range(8):
        if done == 4:
            after = Rounds(TASKS, resumed, config, 8)
            after.set_state(ahead.get_state())
        ahead.draw(done)
        ahead.trained()
    for done in range(4, 8):
        after.draw(done)
        after.trained()
    assert resumed.versions == {first: whole.versions[first] for first in (8, 10, 12, 14)}
    # By hand: step n, from 0, is drawn when step n - staleness begins.
    assert whole.versions == {2 * n: max(n - staleness, 0) for n in range(8)}


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


def test_a_group_that_arrives_during_a_look_is_not_overlooked(tmp_path, monkeypatch):
    run = Run(tmp_path / 'run', recipe(staleness=1, stragglers='wait'))
    begun(run)
    worker = Claims(run.due.url, 'worker', lease_sec=60)
    assert worker.take(('train', 0), 0)
    run.write(1, 2)
    assert run.step()[0] == [1, 2]
    begun(run)
    run.write(*(i for i in run.wanted() if i))
    missing = RolloutStore.missing

    def then_it_ends(store, group_ids):
        """The worker ends group 0 after the learner has asked for it."""
        found = missing(store, group_ids)
        if 0 in found and threading.current_thread() is threading.main_thread():
            monkeypatch.setattr(RolloutStore, 'missing', missing)
            run.write(0, version=0)
            worker.release(('train', 0))
        return found

    monkeypatch.setattr(RolloutStore, 'missing', then_it_ends)
    groups, values = run.step()
    assert 0 in groups and values['rollout/late_groups'] == 0


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


def test_a_deadline_is_for_each_worker_that_draws_a_group(tmp_path):
    run = Run(tmp_path / 'run', recipe(staleness=0, oversample=1, deadline_sec=3.0))
    begun(run)
    dead, heir = (Claims(run.due.url, name, lease_sec=0.01) for name in ('dead', 'heir'))
    assert dead.take(('train', 0), 0)

    def inherit():
        time.sleep(2.0)
        wait_for(lambda: heir.take(('train', 0), 0))
        time.sleep(2.0)  # past the deadline of the first claim, but not of this one
        run.write(0, 1)

    working = threading.Thread(target=inherit)
    working.start()
    groups, values = run.step()
    working.join()
    assert groups == [0, 1] and values['rollout/late_groups'] == 0


def test_what_took_the_place_of_a_dropped_group_may_be_dropped_in_the_same_step(tmp_path):
    run = Run(tmp_path / 'run', recipe(staleness=0, oversample=1, deadline_sec=0.3))
    begun(run)
    state, worker = run.ahead.get_state(), Claims(run.due.url, 'worker', lease_sec=60)

    def work():
        for group_ids, late in (((0, 1), (3, 4)), ((3,), (5,))):
            assert all(worker.take(('train', i), 0) for i in group_ids)
            wait_for(lambda late=late: {*late} <= {*run.wanted()})  # they take their place
        run.write(2, 5)

    working = threading.Thread(target=work)
    working.start()
    assert run.step()[0] == [2, 5]
    working.join()
    run.start(state)
    groups, values = run.step()  # as the ledger says
    assert groups == [2, 5] and values['rollout/late_groups'] == 3
    assert run.wanted() == [4]


def test_a_ledger_of_another_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    state = run.ahead.get_state()
    for row in ({'groups': [0, 60]}, {'groups': [0, 1], 'dropped': [60]}):
        row = {'step': 1, 'dropped': [], **row}
        (run.work.path / 'groups.jsonl').write_text(json.dumps(row) + '\n')
        run.start(state)
        with pytest.raises(ValueError, match=r'step 1 took groups \[60\], which are not in flight'):
            run.step()


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
