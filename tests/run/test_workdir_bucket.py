"""A run in a bucket: a real server on this machine, which TensorStore and Orbax talk to."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import pytest
import tensorstore as ts

from configs.tiny import get_config
from echo_jax.learner.checkpoint import check_reach
from echo_jax.run.evaluating import read_rollouts
from echo_jax.run.workdir import Workdir
from echo_jax.store.kvstore import open_kvstore, write_once
from echo_jax.store.rollouts import RolloutStore
from tests.support.buckets import serving
from tests.support.groups import small_group
from tests.support.small_run import metrics, summary, wait_for

pytest.importorskip('gcsfs')  # which requirements-dev.txt brings


@pytest.fixture(scope='module')
def environment():
    with serving() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture
def machine(environment, tmp_path, monkeypatch):
    """Calling it with a name makes this process another machine: one with another cache."""
    return lambda name: monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / name))


# ------------------------------------------------------------------------------------------ files


def test_the_short_name_of_a_store(environment, tmp_path):
    """RUN/heldout_before stands for RUN/rollouts/heldout_before, in a bucket as in a folder."""
    for run in ('gs://bucket/named', str(tmp_path / 'named')):
        group = small_group(0, 'task', version=0)
        RolloutStore(f'{run}/rollouts/heldout_before').write_group(group)
        for name in (f'{run}/heldout_before', f'{run}/rollouts/heldout_before/'):
            assert len(read_rollouts(name, vocabulary=1000)) == len(group)


def test_the_first_of_many_writers_wins(environment):
    start, won = threading.Barrier(8), {}

    def write(number):
        kvstore = open_kvstore('gs://bucket/once')
        start.wait()
        won[number] = write_once(kvstore, 'key', b'%d' % number)

    threads = [threading.Thread(target=write, args=[number]) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    [winner] = [number for number in won if won[number]]
    kvstore = open_kvstore('gs://bucket/once')
    assert kvstore['key'] == b'%d' % winner

    # The server refuses it, and not only write_once, which looks first.
    none = kvstore.read('absent').result().stamp.generation
    old = kvstore.read('key').result().stamp.generation
    kvstore['key'] = b'newer'
    for seen in (none, old):
        assert kvstore.write('key', b'late', if_equal=seen).result().generation == b''
        assert kvstore.write('key', None, if_equal=seen).result().generation == b''
    assert kvstore['key'] == b'newer'


def test_another_machine_finds_the_files(machine):
    machine('first')
    work = Workdir('gs://bucket/files', get_config())
    (work.path / 'model' / 'deep').mkdir(parents=True)
    (work.path / 'model' / 'deep' / 'a').write_bytes(b'\r\n\0a\n')
    (work.path / 'model' / 'b').write_text('b')
    (work.path / 'metrics.jsonl').write_text('{"step": 1}\n')
    work.share('model', 'metrics.jsonl', 'not-there')
    there = {key.decode() for key in open_kvstore('gs://bucket/files').list().result()}
    assert {'config.json', 'metrics.jsonl', 'model/b', 'model/deep/a'} < there

    machine('second')
    assert Workdir.holds_run('gs://bucket/files/')
    other = Workdir.open('gs://bucket/files/')
    assert other.path != work.path and not list(other.path.iterdir())
    assert other.config.to_dict() == get_config().to_dict()
    assert (other.served_model() / 'deep' / 'a').read_bytes() == b'\r\n\0a\n'
    assert other.take('metrics.jsonl') and not other.take('not-there')
    (work.path / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n')
    work.share('metrics.jsonl')
    assert other.take('metrics.jsonl')
    assert (other.path / 'metrics.jsonl').read_text().count('\n') == 2
    assert sorted(path.name for path in other.path.iterdir()) == ['metrics.jsonl', 'model']


def test_a_folder_that_is_not_all_there_is_not_taken(machine):
    machine('first')
    work = Workdir('gs://bucket/torn', get_config())
    open_kvstore('gs://bucket/torn')['tokenizer/vocab.json'] = b'{}'  # and its writer died
    assert not work.take('tokenizer')
    assert not (work.path / 'tokenizer').exists()


def test_every_machine_has_the_same_tasks_and_tokenizer(machine):
    config = get_config()
    config.tasks.train_count, config.model.vocab_size = 8, 300
    made = {}
    for name in ('first', 'second'):
        machine(name)
        work = Workdir('gs://bucket/tokenizer', config)
        made[name] = work.tokenizer().get_vocab(), [t.instruction for t in work.tasks('train')]
    assert made['first'] == made['second']
    keys = open_kvstore('gs://bucket/tokenizer').list().result()
    assert not any(key.startswith(b'tasks') for key in keys)


def test_a_run_made_again_has_nothing_of_the_old_one(machine):
    machine('first')
    old = Workdir('gs://bucket/again', get_config())
    (old.path / 'metrics.jsonl').write_text('{"step": 1}\n')
    assert Workdir('gs://bucket/again', get_config()).path == old.path
    open_kvstore('gs://bucket/again').delete_range(ts.KvStore.KeyRange()).result()
    new = Workdir('gs://bucket/again', get_config())
    assert not (new.path / 'metrics.jsonl').exists()


def test_a_run_that_goes_on_with_another_config_keeps_its_folders(machine):
    machine('first')
    config = get_config()
    work = Workdir('gs://bucket/longer', config, is_learner=True)
    (work.path / 'summary.json').write_text('{}')
    work.share('summary.json')
    left, taking = work.path / 'taking-left', work.path / 'taking-now'
    for folder in (left, taking):
        folder.mkdir()
    os.utime(left, (0, 0))  # by a process that was killed long ago
    for steps in (100, 120):  # each writes config.json anew, which has another generation then
        config.num_steps = steps
        learner = Workdir('gs://bucket/longer', config, is_learner=True)
        assert learner.path == work.path
        assert learner.go_on(80).keys() == {'num_steps'}
    learner.remove('summary.json')
    assert Workdir.open('gs://bucket/longer').config.num_steps == 120
    assert Workdir('gs://bucket/longer', get_config()).path == work.path  # a worker of before
    assert taking.exists() and not left.exists()

    machine('second')
    other = Workdir.open('gs://bucket/longer')
    assert other.config.num_steps == 120 and not other.take('summary.json')
    assert other.take('config_history.jsonl')
    rows = (other.path / 'config_history.jsonl').read_text().splitlines()
    assert [json.loads(row)['changes']['num_steps'] for row in rows] == [[80, 100], [100, 120]]


def test_refusals(machine):
    machine('first')
    Workdir('gs://bucket/mine', get_config())
    with pytest.raises(ValueError, match=r'gs://bucket/mine is a run of another config \(seed is'):
        config = get_config()
        config.seed += 1
        Workdir('gs://bucket/mine', config)
    open_kvstore('gs://bucket/photos')['cat.jpg'] = b'...'
    with pytest.raises(ValueError, match='gs://bucket/photos is not empty and holds no run'):
        Workdir('gs://bucket/photos', get_config())
    with pytest.raises(ValueError, match='gs://bucket/none holds no run'):
        Workdir.open('gs://bucket/none')
    with pytest.raises(ValueError, match='s3://bucket/run: a run lives in a folder or at gs://'):
        Workdir('s3://bucket/run', get_config())
    with pytest.raises(ValueError, match=r'^gs://lost/run: NOT_FOUND: [^\n]*give a bucket that ex'):
        Workdir('gs://lost/run', get_config())


def test_saving_to_a_bucket_needs_gcsfs(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(ValueError, match='save to gs://bucket/run Orbax needs gcsfs; pip install'):
        check_reach('gs://bucket/run')
    check_reach('runs/tiny')


def test_no_credentials(programs, tmp_path):
    flags = ['--config=configs/tiny.py', '--workdir=gs://bucket/run']
    with serving('--token=another') as environment:
        done = programs.run('train', *flags, XDG_CACHE_HOME=str(tmp_path), **environment)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]  # behind what TensorStore logs
    assert line.startswith('error: gs://bucket/run: PERMISSION_DENIED') and 'credentials' in line


# -------------------------------------------------------------------------------------------- runs


def test_a_killed_run_goes_on_from_another_machine(environment, programs, finished, tmp_path):
    place, store = 'gs://bucket/runs/small', open_kvstore('gs://bucket/runs/small')

    def run(program, machine, *flags):
        home = {'XDG_CACHE_HOME': str(tmp_path / machine)}
        done = programs.run(program, *flags, **environment, **home)
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])

    first = environment | {'XDG_CACHE_HOME': str(tmp_path / 'first')}
    process = programs.start(
        'train', *programs.train_flags(place), output=subprocess.DEVNULL, **first
    )
    try:  # in the fifth step: saved after the fourth
        begun = ts.KvStore.KeyRange('rollouts/train/groups/000000000008', 'rollouts/train/groups0')
        wait_for(lambda: process.poll() is not None or store.list(begun).result())
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    saved = [json.loads(line)['step'] for line in store['metrics.jsonl'].splitlines()]
    assert saved and saved == list(range(1, saved[-1] + 1)) and saved[-1] in (2, 4)
    assert store.read('summary.json').result().state == 'missing'

    run('train', 'second', *programs.train_flags(place))
    for name in ('metrics.jsonl', 'summary.json'):
        (tmp_path / name).write_bytes(store[name])
    assert metrics(tmp_path) == metrics(finished)
    assert summary(tmp_path) == summary(finished)
    keys = [key.decode() for key in store.list().result()]
    assert {'curves.png', 'warm_start.jsonl', 'tokenizer/tokenizer.json'} < set(keys)
    events = [key for key in keys if 'tfevents' in key]
    assert len(events) >= 3  # warm start and steps of the first, steps of the second

    for name, source in (('bucket', place), ('folder', f'file://{finished}')):
        run('export', 'third', f'--workdir={source}', f'--output={tmp_path / name}')
    model = (tmp_path / 'bucket' / 'model.safetensors').read_bytes()
    assert len(model) > 10_000 and model == (tmp_path / 'folder' / 'model.safetensors').read_bytes()


def test_a_file_url_is_its_folder(tmp_path):
    work = Workdir(f'file://{tmp_path}/run', get_config())
    assert work.path == pathlib.Path(tmp_path / 'run')
    assert Workdir.open(f'file://{tmp_path}/run').url('weights') == f'{tmp_path}/run/weights'
