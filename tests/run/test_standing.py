"""Where a run stands, by hand: real stores, as a learner and its workers leave them."""

import json
import os
import time

import pytest

from echo_jax.policy.meter import Meter
from echo_jax.run.standing import look
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Claims
from echo_jax.store.due import DueGroups, DueStore
from tests.support.buckets import serving
from tests.support.viewed_run import make_run, write_group, write_rows

DUE = DueGroups('train', 'train', 0, tuple(f'task-{i}' for i in range(6)), 3, 1.0, version=0)


@pytest.fixture
def work(tmp_path):
    return make_run(tmp_path / 'run', backend='vllm')


def report(work, name: str, ago: float = 0.0, **values: float) -> None:
    said = {'version': 3, 'rollouts': 8, 'failed': 1, 'swaps': 2, 'at': time.time() - ago}
    DueStore(work.url('fleet')).report(name, Meter().read() | said | values)


def test_the_steps_by_hand(work):
    write_rows(work, 1, 30, **{'time/step': 100.0})  # all but the last 20 rows are of no interest
    more = {'time/step': 5.0, 'system/learned_tokens_per_sec': 640.0}
    more |= {'rollout/age/0': 0.75, 'rollout/age/1': 0.25, 'rollout/late_groups': 1.0}
    more |= {'rollout/error/SandboxError': 2.0, 'rollout/error/OSError': 1.0, 'time/left': 77.0}
    more |= {'system/damaged_groups': 2.0}
    write_rows(work, 31, 50, **more)
    assert (look(work)['recent_steps'], look(work)['seconds_a_step']) == (20, 5.0)
    with (work.path / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 51, "time/st')  # it is being written
    found = look(work)
    assert (found['step'], found['steps'], found['finished']) == (50, 10, False)
    assert found['learner_idle'] == 3.0 / 5.0  # 3 s of sampling in each step of 5 s
    assert (found['seconds_a_step'], found['seconds_left']) == (5.0, 77.0)
    assert found['ages'] == {0: 0.75, 1: 0.25} and found['learned_tokens_per_sec'] == 640.0
    assert found['recent_steps'] == 20 and found['statuses']['infra_error'] == 20 * 2
    assert found['errors'] == {'OSError': 20, 'SandboxError': 40} and found['late_groups'] == 20
    assert found['damaged_groups'] == 2
    assert 0 <= found['seconds_since_a_step'] < 60
    os.utime(work.path / 'metrics.jsonl', (0, time.time() - 300))
    assert 300 <= look(work)['seconds_since_a_step'] < 360
    (work.path / 'summary.json').write_text('{"steps": 50}')
    found = look(work)
    assert (found['finished'], found['steps'], found['seconds_left']) == (True, 50, None)


def test_the_queue_by_hand(work):
    fleet = DueStore(work.url('fleet'))
    assert look(work)['queue'] == {'due': 0, 'drawn': 0, 'whole': 0, 'free': 0}
    fleet.post(DUE)
    claims = Claims(fleet.url, 'box-0', lease_sec=60)
    for group_id in (0, 2):
        assert claims.take(('train', group_id), 0)
    for group_id in (0, 1):  # whole; the claim on group 0 is not given up yet
        write_group(work, group_id)
    assert look(work)['queue'] == {'due': 6, 'drawn': 1, 'whole': 2, 'free': 3}
    fleet.remove(DUE, [0, 3])
    assert look(work)['queue'] == {'due': 4, 'drawn': 1, 'whole': 1, 'free': 2}


def test_workers_that_are_silent(work, caplog):
    lease = work.config.policy.lease_sec
    report(work, 'a', ago=lease / 2)
    report(work, 'b', ago=lease + 1)
    first, second = look(work)['workers']
    assert [first['silent'], second['silent']] == [False, True]
    assert lease / 2 <= first['seconds_ago'] < lease < second['seconds_ago']
    (work.path / 'summary.json').write_text('{"steps": 1}')  # they have ended with the run
    assert [each['silent'] for each in look(work)['workers']] == [False, False]
    (work.path / 'fleet' / 'workers' / 'a').write_bytes(b'half of a rep')
    (other,) = look(work)['workers']
    assert other['worker'] == 'b' and 'workers/a is damaged' in caplog.text


def test_bytes_by_store(work):
    before = look(work)['disk']
    write_group(work, 0)
    write_group(work, 1, store='heldout_before')
    for name, size in (('weights/data/0/c', 1000), ('checkpoints/train/1/a', 300), ('other', 50)):
        file = work.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'x' * size)
    found = look(work)['disk']
    groups = [*(work.path / 'rollouts').rglob('groups/*')]
    assert len(groups) == 2 and found['rollouts'] == sum(file.stat().st_size for file in groups)
    assert (found['weights'], found['checkpoints']) == (1000, 300)
    assert found['rest'] == before['rest'] + 50 and found['free'] > 0


@pytest.mark.parametrize('ending', ['/', '//', '/.'])
def test_a_folder_may_be_named_with_a_slash(work, ending):
    write_rows(work, 1, 2)
    found = look(Workdir.open(f'{work.path}{ending}'))
    assert found['run'] == str(work.path) and found['disk'] and found['seconds_since_a_step'] >= 0


def test_a_run_that_has_not_begun(tmp_path):
    work = make_run(tmp_path / 'run')
    found = look(work)
    assert (found['step'], found['steps'], found['finished']) == (0, 10, False)
    unknown = ('learner_idle', 'seconds_left', 'seconds_a_step', 'warm_start_step', 'queue')
    assert [found[name] for name in unknown] == [None] * len(unknown)
    assert found['workers'] == [] and found['recent_steps'] == 0
    (work.path / 'warm_start.jsonl').write_text('{"step": 10}\n{"step": 20}\n')
    assert look(work)['warm_start_step'] == 20
    json.dumps(look(work), allow_nan=False)


@pytest.mark.slow
def test_a_run_in_a_bucket(tmp_path, monkeypatch):
    with serving() as variables:
        for name, value in (variables | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}).items():
            monkeypatch.setenv(name, value)
        made = make_run(tmp_path / 'run', backend='vllm')
        work = Workdir('gs://bucket/run', made.config)
        DueStore(work.url('fleet')).post(DUE)
        report(work, 'a')
        write_group(work, 1)
        write_rows(work, 1, 2, **{'time/step': 4.0})
        work.share('metrics.jsonl')
        write_rows(work, 3, 3)  # what the learner has not shared yet
        found = look(Workdir.open('gs://bucket/run'))
        assert found['step'] == 2 and found['learner_idle'] == 3 / 4
        assert found['queue'] == {'due': 6, 'drawn': 0, 'whole': 1, 'free': 5}
        assert [each['worker'] for each in found['workers']] == ['a']
        assert found['disk'] is None and found['seconds_since_a_step'] is None
