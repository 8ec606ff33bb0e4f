"""A learner and its workers as processes of their own.

vLLM, sandboxes, stores and signals are real. Needs the environment of `make rollout`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
from collections.abc import Sequence

import docker
import psutil
import pytest

from echo_jax.store.due import DueStore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Status
from tests.support.bad_tasks import break_link, make_set
from tests.support.small_run import NO_WARM_START, ROOT, SETTINGS, metrics, wait_for

ROLLOUT_PYTHON = pathlib.Path(
    os.environ.get('ECHO_ROLLOUT_PYTHON', ROOT / '.venv-rollout/bin/python')
)
STEPS, GROUPS, SIZE = SETTINGS['num_steps'], SETTINGS['batch']['groups'], SETTINGS['group_size']
VLLM = '--config.policy.backend=vllm', '--config.model.head_dim=32'  # vLLM's least on a CPU

pytestmark = [
    pytest.mark.skipif(
        not ROLLOUT_PYTHON.exists(), reason=f'no {ROLLOUT_PYTHON}: `make rollout` makes it'
    ),
    pytest.mark.timeout(600),
]


class Fleet:
    """The processes of one run. Their output goes to files beside its workdir."""

    def __init__(self, programs, folder: pathlib.Path, *flags: str, without: Sequence[str] = ()):
        self.workdir, self._folder, self._programs = folder / 'run', folder, programs
        if not without and set(NO_WARM_START) <= set(flags):
            without = ['warm_start']
        self._flags = programs.train_flags(self.workdir, *VLLM, *flags, without=without)
        self.environment: dict[str, str] = {}
        self._started: list[subprocess.Popen] = []

    def learner(self) -> subprocess.Popen:
        return self._start('train')

    def learners(self) -> list[subprocess.Popen]:
        """Starts the two processes of one learner."""
        with socket.create_server(('localhost', 0)) as free:
            port = free.getsockname()[1]
        address = {'JAX_COORDINATOR_ADDRESS': f'localhost:{port}', 'JAX_PROCESS_COUNT': '2'}
        return [self._start('train', **address, JAX_PROCESS_ID=str(i)) for i in range(2)]

    def worker(self, *flags: str) -> subprocess.Popen:
        return self._start('worker', *flags, python=ROLLOUT_PYTHON)

    def ray(self, address: str, *flags: str) -> subprocess.Popen:
        """Starts launch/ray/fleet.py for this run."""
        script = ROOT / 'launch' / 'ray' / 'fleet.py'
        return self._start(script, f'--address={address}', *flags, python=ROLLOUT_PYTHON)

    def _start(self, program: str | pathlib.Path, *flags: str, **options) -> subprocess.Popen:
        name = pathlib.Path(program).stem
        with (self._folder / f'{name}{len(self._started)}.log').open('w') as log:
            process = self._programs.start(
                program, *self._flags, *flags, output=log, **self.environment | options
            )
        self._started.append(process)
        return process

    def ends(self, process: subprocess.Popen, seconds: float = 300) -> int:
        return process.wait(seconds)

    def logs(self) -> str:
        files = sorted(self._folder.glob('*.log'))
        return '\n'.join(f'--- {file.name}\n{file.read_text()[-3000:]}' for file in files)

    def groups(self) -> list[int]:
        return RolloutStore(self.workdir / 'rollouts' / 'train').groups()

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        wait_for(lambda: not self._programs.alive())


@pytest.fixture
def fleet(programs, tmp_path, request):
    fleet = Fleet(programs, tmp_path, *getattr(request, 'param', ()))
    yield fleet
    print(fleet.logs())
    fleet.stop()


def assert_whole(fleet: Fleet) -> list[dict]:
    """Asserts that every group of every step is there, once and whole. Returns all metrics."""
    rows = metrics(fleet.workdir)
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    assert fleet.groups() == list(range(STEPS * GROUPS))
    groups = RolloutStore(fleet.workdir / 'rollouts' / 'train').read_groups(fleet.groups())
    assert all([r.sample_id for r in group] == list(range(SIZE)) for group in groups)
    assert (fleet.workdir / 'summary.json').exists()
    return rows


def assert_each_once(fleet: Fleet, staleness: int) -> list[dict]:
    """Asserts that every step trained on whole groups that no other did, by groups.jsonl.

    Returns all metrics. Other groups stand in for those that came too late, as on a busy machine.
    """
    lines = (fleet.workdir / 'groups.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    taken = [group for row in rows for group in row['groups']]
    assert [row['step'] for row in rows] == list(range(1, STEPS + 1))
    assert len(taken) == len(set(taken)) == STEPS * GROUPS
    groups = RolloutStore(fleet.workdir / 'rollouts' / 'train').read_groups(taken)
    assert all([r.sample_id for r in group] == list(range(SIZE)) for group in groups)
    found = metrics(fleet.workdir)
    assert [row['step'] for row in found] == list(range(1, STEPS + 1))
    assert all(row['rollout/max_staleness'] <= staleness for row in found)
    assert (fleet.workdir / 'summary.json').exists()
    return found


@pytest.mark.parametrize(
    'fleet',
    [
        (
            '--config.max_staleness=2',
            '--config.model.tie_word_embeddings=False',
            '--config.policy.keyframe_every=2',
        )
    ],
    indirect=True,
)
def test_steps_ahead_are_drawn_while_the_learner_learns(fleet):
    learner, worker = fleet.learner(), fleet.worker()
    assert fleet.ends(learner) == 0
    assert fleet.ends(worker) == 0  # by itself, since the learner has finished
    rows = assert_each_once(fleet, staleness=2)
    staleness = [row['rollout/max_staleness'] for row in rows]
    assert staleness[0] == 0 and max(staleness) >= 1
    assert rows[0]['rollout/age/0'] == 1 and min(row['rollout/age/0'] for row in rows) < 1
    assert 0 < rows[0]['train/logprob_gap'] <= 1e-3  # the others are of older weights


def test_workers_and_learners_end_and_start_again(fleet):
    """SIGKILL of a worker, SIGTERM of another, SIGKILL of the learner, while groups are drawn."""
    learner, workers = fleet.learner(), [fleet.worker(), fleet.worker()]
    wait_for(lambda: len(fleet.groups()) >= GROUPS, seconds=400)
    workers[0].kill()
    workers[1].send_signal(signal.SIGTERM)
    assert [fleet.ends(worker, 60) for worker in workers] == [-signal.SIGKILL, 1]
    assert 'the same command goes on' in fleet.logs()
    workers = [fleet.worker(), fleet.worker()]
    wait_for(lambda: len(fleet.groups()) >= 2 * GROUPS, seconds=400)
    learner.kill()
    assert fleet.ends(learner, 60) == -signal.SIGKILL
    learner = fleet.learner()
    assert fleet.ends(learner) == 0 and [fleet.ends(worker) for worker in workers] == [0, 0]
    for row in assert_whole(fleet):
        # Every step is sampled right after a swap, and all weights are float32.
        assert 0 < row['train/logprob_gap'] <= 1e-3 and row['rollout/staleness'] == 0


@pytest.mark.parametrize(
    'fleet',
    [(*NO_WARM_START, '--config.policy.lease_sec=3', '--config.max_staleness=1')],
    indirect=True,
)
def test_a_dead_workers_groups_go_to_one_that_joins_late(fleet):
    """Nobody starts the first worker again; the second has another name and machine, as it were."""
    learner, first = fleet.learner(), fleet.worker('--name=first')
    due = DueStore(fleet.workdir / 'fleet')
    wait_for(lambda: any(r['drawing'] for r in due.reports()) and fleet.groups(), seconds=400)
    first.kill()
    second = fleet.worker('--name=second')
    assert fleet.ends(learner) == 0 and fleet.ends(second) == 0
    assert_each_once(fleet, staleness=1)
    reports = {report['worker']: report for report in due.reports()}
    assert reports['second']['groups'] > 0
    claims = (fleet.workdir / 'fleet' / 'claims').rglob('*')
    assert not [file for file in claims if file.is_file() and file.suffix != '.__lock']


LATE = '--config.max_staleness=1', '--config.batch.deadline_sec=200'
DROP = *LATE, '--config.batch.stragglers=drop', '--config.batch.oversample=1'
WAIT = *LATE, '--config.batch.stragglers=wait'


@pytest.mark.parametrize('fleet', [(*NO_WARM_START, *DROP), (*NO_WARM_START, *WAIT)], indirect=True)
def test_steps_take_the_groups_that_are_whole(fleet):
    """The learner is killed, and trains on each group once all the same."""
    learner, worker = fleet.learner(), fleet.worker()
    file = fleet.workdir / 'metrics.jsonl'
    wait_for(lambda: file.exists() and len(metrics(fleet.workdir)) >= 3, seconds=500)
    learner.kill()
    learner.wait()
    learner = fleet.learner()
    assert fleet.ends(learner) == 0 and fleet.ends(worker) == 0
    assert_each_once(fleet, staleness=1)


@pytest.mark.parametrize('moment', ['begins', 'imports'])
@pytest.mark.parametrize('fleet', [NO_WARM_START], indirect=True)
def test_a_worker_that_is_killed_while_its_engine_starts_leaves_nothing(fleet, moment):
    """vLLM's own processes outlive theirs; one that has imported vLLM waits for five minutes."""
    fleet.learner()
    worker = fleet.worker()
    process = psutil.Process(worker.pid)

    def has_come() -> bool:
        maps = [pathlib.Path(f'/proc/{child.pid}/maps') for child in process.children()]
        return len(maps) >= 2 and (
            moment == 'begins' or any('libtorch' in file.read_text() for file in maps)
        )

    wait_for(has_come, seconds=300)
    children = process.children(recursive=True)
    worker.kill()
    worker.wait()
    assert psutil.wait_procs(children, timeout=100)[1] == []


def test_two_workers_have_no_name_in_common(fleet):
    fleet.learner()
    first = fleet.worker('--name=same')
    wait_for(lambda: (fleet.workdir / 'workers' / 'same.lock').exists(), seconds=200)
    assert fleet.ends(fleet.worker('--name=same'), 100) == 1
    assert 'a worker named same draws for this run already' in fleet.logs()
    assert fleet.ends(fleet.worker('--name=../same'), 100) == 1
    assert 'expected letters, digits' in fleet.logs() and first.poll() is None


def test_a_bad_task_ends_neither_learner_nor_worker(programs, tmp_path):
    bad, word = make_set(tmp_path / 'set', break_link)
    without = ['warm_start', 'tasks.train_count']
    flags = f'--config.tasks.train={tmp_path / "set"}', *NO_WARM_START
    fleet = Fleet(programs, tmp_path, *flags, without=without)
    try:
        learner, worker = fleet.learner(), fleet.worker()
        assert [fleet.ends(learner), fleet.ends(worker)] == [0, 0], fleet.logs()
        assert_whole(fleet)
        groups = RolloutStore(fleet.workdir / 'rollouts' / 'train').read_groups(fleet.groups())
        rollouts = [rollout for group in groups for rollout in group]
        lost = [rollout for rollout in rollouts if rollout.status == Status.INFRA_ERROR]
        assert {rollout.task_id for rollout in lost} == {bad}
        assert all(word in rollout.reason for rollout in lost)
        host = socket.gethostname()
        whose = f'] run=run host={host} process={worker.pid} worker={host}-0: '
        assert f'{whose}task {bad}, ' in fleet.logs()
        (report,) = DueStore(fleet.workdir / 'fleet').reports()
        assert report['failed'] == len(lost) and report['swaps'] > 1
        assert report['sampled_tokens'] > 0 and 0 < report['idle'] < 1 and report['swapping'] > 0
        text = (fleet.workdir / 'metrics.jsonl').read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert all(0 <= row[f'system/engine_idle/{host}-0'] <= 1 for row in rows)
    finally:
        fleet.stop()


@pytest.mark.parametrize('fleet', [NO_WARM_START], indirect=True)
def test_a_learner_of_two_processes(fleet):
    """Each publishes its shards and reads all groups. They stop and resume together."""
    worker = fleet.worker()
    learners = fleet.learners()
    wait_for(lambda: len(fleet.groups()) >= 2 * GROUPS, seconds=400)
    learners[0].send_signal(signal.SIGTERM)
    assert [fleet.ends(learner, 120) for learner in learners] == [1, 1]
    assert [fleet.ends(learner) for learner in fleet.learners()] == [0, 0]
    assert fleet.ends(worker) == 0
    assert all(row['train/logprob_gap'] <= 1e-3 for row in assert_whole(fleet))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    'fleet',
    [(*NO_WARM_START, '--config.policy.lease_sec=3', '--config.max_staleness=2')],
    indirect=True,
)
def test_a_pod_in_small(fleet):
    """A learner of two processes and three workers, of which one dies and one joins late."""
    learners = fleet.learners()
    stays, dies = fleet.worker('--name=stays'), fleet.worker('--name=dies')
    due = DueStore(fleet.workdir / 'fleet')
    wait_for(lambda: {r['worker'] for r in due.reports() if r['drawing']} >= {'dies'}, seconds=400)
    dies.kill()
    joins = fleet.worker('--name=joins')
    assert [fleet.ends(process, 500) for process in (*learners, stays, joins)] == [0] * 4
    assert_each_once(fleet, staleness=2)
    reports = {report['worker']: report for report in due.reports()}
    assert reports['stays']['groups'] > 0 and 'joins' in reports
    claims = (fleet.workdir / 'fleet' / 'claims').rglob('*')
    assert not [file for file in claims if file.is_file() and file.suffix != '.__lock']


@pytest.fixture
def cluster(programs, tmp_path):
    """The process of ray_cluster.py: it obeys its stdin, and `address` is what it printed."""
    with (tmp_path / 'ray.txt').open('w') as log:
        process = subprocess.Popen(
            [ROLLOUT_PYTHON, ROOT / 'tests' / 'support' / 'ray_cluster.py'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=programs.environment,
        )
    said = (line.split() for line in process.stdout)
    process.address = next(words[1] for words in said if words[:1] == ['address'])
    yield process
    process.stdin.close()
    process.wait(60)


def test_a_ray_cluster_loses_a_node(fleet, cluster):
    learner = fleet.learner()
    workers = fleet.ray(cluster.address, '--workers=2', '--gpus=0')
    due = DueStore(fleet.workdir / 'fleet')
    wait_for(lambda: sum(report['groups'] > 0 for report in due.reports()) == 2, seconds=500)
    print('kill', file=cluster.stdin, flush=True)
    assert fleet.ends(learner, 500) == 0
    assert fleet.ends(workers, 120) == 0
    assert_whole(fleet)


DOCKER = '--config.sandbox.backend=docker', '--config.sandbox.memory_mb=128'


@pytest.mark.parametrize('fleet', [DOCKER], indirect=True)
def test_a_worker_and_then_the_engine_die_under_running_containers(fleet, daemon):
    if daemon.process is None:
        pytest.skip('the Docker engine that answers is not ours to kill')
    client = docker.DockerClient(daemon.url)
    ours = {'label': 'echo_jax.run'}

    def running() -> list:
        return client.containers.list(filters=ours, ignore_removed=True)

    fleet.environment['DOCKER_HOST'] = daemon.url
    learner, worker = fleet.learner(), fleet.worker()
    wait_for(lambda: len(fleet.groups()) >= 1 and running(), seconds=500)
    worker.kill()
    wait_for(lambda: not running(), seconds=60)  # with nobody's help
    worker = fleet.worker()
    wait_for(lambda: len(fleet.groups()) >= GROUPS + 1 and running(), seconds=500)
    daemon.kill()
    daemon.start()
    assert fleet.ends(learner, 500) == 0 and fleet.ends(worker) == 0
    assert_whole(fleet)
    groups = RolloutStore(fleet.workdir / 'rollouts' / 'train').read_groups(fleet.groups())
    assert all(r.status != Status.INFRA_ERROR for group in groups for r in group)
    wait_for(lambda: not client.containers.list(all=True, filters=ours), seconds=60)
    assert not client.volumes.list(filters=ours)
    client.close()
