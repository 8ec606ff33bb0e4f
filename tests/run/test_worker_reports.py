"""What a worker says of itself: a real worker, sandboxes and stores; its turns follow a script."""

import asyncio
import re

import numpy as np
import pytest

from configs import tiny
from echo_jax.policy.meter import Meter, Swap
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.run import rollout_worker
from echo_jax.run.rollout_worker import RolloutWorker
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Claims, NameTaken, read_claims
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.kvstore import CorruptError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.tasks.generate import generate_tasks
from echo_jax.types import Role
from tests.support.episodes import DONE, bash
from tests.support.metrics_page import table
from tests.support.small_disk import small_disk


class Engine(ScriptedPolicy):
    """A script behind what a worker needs of an engine, with swaps of known cost."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.version, self.swap, self.meter = -1, None, Meter()
        self.faults = 0  # how many of the next loads fail

    async def load(self, version):
        if self.faults:
            self.faults -= 1
            raise CorruptError(f'version {version} is corrupt')
        self.version = version
        self.swap = Swap(version, 1e-4, 4.0, 0.25, 2.0, version + 0.5)

    async def generate(self, *arguments, **options):
        with self.meter.turn():
            generation = await super().generate(*arguments, **options)
        self.meter.sampled(len(generation.token_ids))
        return generation

    async def close(self):
        pass


def report_names() -> list[str]:
    """The names of docs/metrics.md as patterns."""
    names = table("Workers' reports")
    return [re.escape(name).replace('CLASS', r'\w+') for name in names]


class Fleet:
    """A worker of a run in `folder`, and what the learner does to it."""

    def __init__(self, folder, tokenizer, script):
        generate_tasks(folder / 'set', split='train', count=1)
        (self.known,) = (path.name for path in (folder / 'set').iterdir() if path.is_dir())
        config = tiny.get_config()
        config.tasks.train = str(folder / 'set')
        config.policy.backend, config.policy.swap = 'vllm', 'drain'
        config.policy.lease_sec = 1.0
        work = Workdir(folder / 'run', config)
        self.due = DueStore(work.url('fleet'))
        self.rollouts = RolloutStore(work.url('rollouts', 'train'))
        self.weights = WeightStore(work.url('weights'))
        self.engine = Engine(tokenizer, script)
        self.worker = RolloutWorker(work, self.engine, 'box-0')

    async def post(self, number: int, *task_ids: str) -> None:
        """Publishes version `number`, and waits for its groups, one of each task."""
        self.weights.publish({'w': np.ones(2, np.float32)}, number)
        first = number * len(task_ids)
        self.due.post(DueGroups('train', 'train', first, task_ids, 3, 1.0, number))
        while self.rollouts.missing(range(first + len(task_ids))):
            await asyncio.sleep(0.05)


@pytest.fixture
def fleet_in(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(Workdir, 'tokenizer', lambda self: tiny_tokenizer)
    return lambda folder, *script: Fleet(folder, tiny_tokenizer, script or [DONE])


@pytest.mark.slow
def test_a_worker_outlives_a_full_disk(tmp_path, fleet_in, monkeypatch, caplog):
    monkeypatch.setattr(rollout_worker, 'AVOIDED_SECONDS', 0.5)
    monkeypatch.setattr(rollout_worker, 'STORE_SECONDS', 0.5)
    with small_disk(tmp_path / 'disk') as disk:
        fleet = fleet_in(disk.path)

        async def main():
            serving = asyncio.create_task(fleet.worker.serve())
            await fleet.post(0, fleet.known)
            posting = asyncio.create_task(fleet.post(1, fleet.known))
            await asyncio.sleep(0)  # it has posted, and waits
            disk.fill()
            while caplog.text.count('No space left on device') < 3:
                assert not serving.done()
                await asyncio.sleep(0.05)
            disk.make_room()
            await posting
            fleet.due.finish()
            await serving
            await fleet.worker.close()

        asyncio.run(main())
        assert fleet.rollouts.groups() == [0, 1]
        assert 'make room on its disk' in caplog.text


@pytest.mark.slow
def test_a_worker_counts_what_it_did(tmp_path, fleet_in):
    fleet = fleet_in(tmp_path)
    rollouts = fleet.rollouts

    async def main():
        serving = asyncio.create_task(fleet.worker.serve())
        for version in (0, 1):
            await fleet.post(version, fleet.known, 'unknown')  # this machine has one of the two
        fleet.due.finish()
        await serving
        await fleet.worker.close()

    asyncio.run(main())
    (report,) = fleet.due.reports()
    # Two groups of three episodes that say "done" at once, two of a task that is not here.
    expected = {'groups': 4, 'rollouts': 12, 'failed': 6, 'drawing': 0, 'episodes': 0}
    expected |= {'status/infra_error': 6, 'error/ValueError': 6, 'status/truncated': 0}
    assert {name: report[name] for name in expected} == expected
    assert sum(value for name, value in report.items() if name.startswith('status/')) == 12
    drawn = [r for group in rollouts.read_groups(rollouts.groups()) for r in group]
    acting = sum(int((r.roles == Role.ACTION).sum()) for r in drawn)
    assert report['sampled_tokens'] == acting > 6
    # Versions 0 and 1 were loaded, the latter's probe taking 1 s more.
    costs = {'swaps': 2, 'total_read_seconds': 8, 'total_drain_seconds': 0.5}
    costs |= {'total_load_seconds': 4, 'total_probe_seconds': 0.5 + 1.5}
    assert {name: report[name] for name in costs} == costs
    assert (report['version'], report['load_seconds'], report['probe_seconds']) == (1, 2.0, 1.5)
    assert 0 < report['idle'] <= 1 and report['seconds'] > 0
    # It says what docs/metrics.md describes, and all of that.
    patterns = report_names()
    assert [name for name in report if not any(re.fullmatch(p, name) for p in patterns)] == []
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in report)] == []


@pytest.mark.slow
def test_a_group_is_claimed_when_its_weights_are_out(tmp_path, fleet_in):
    """Else a learner that is killed before they are, and goes on with earlier groups, could find
    its workers full of groups that wait for ever.
    """
    fleet = fleet_in(tmp_path)
    later = DueGroups('train', 'train', 100, (fleet.known,) * 22, 3, 1.0, 5)  # more than 64 slots

    async def main():
        fleet.due.post(later)
        serving = asyncio.create_task(fleet.worker.serve())
        await fleet.post(0, fleet.known)
        assert not read_claims(fleet.due.url, 'train').keys() - {0}
        fleet.weights.publish({'w': np.ones(2, np.float32)}, 5)
        while fleet.rollouts.missing(later.group_ids):
            await asyncio.sleep(0.05)
        fleet.due.finish()
        await serving
        await fleet.worker.close()

    asyncio.run(main())


@pytest.mark.slow
def test_a_worker_ends_if_another_has_its_name(tmp_path, fleet_in):
    """Only a bucket lets them meet: on one machine the second does not start."""
    fleet = fleet_in(tmp_path, bash('sleep 60'), DONE)
    other = Claims(fleet.due.url, fleet.worker.name, 1.0)

    async def main():
        serving = asyncio.create_task(fleet.worker.serve())
        posting = asyncio.create_task(fleet.post(0, fleet.known))
        while not read_claims(fleet.due.url, 'train'):
            await asyncio.sleep(0.01)
        assert other.take(('train', 0), 0)
        with pytest.raises(ExceptionGroup) as raised:
            await serving
        posting.cancel()
        await fleet.worker.close()
        return raised

    assert asyncio.run(main()).group_contains(NameTaken, match='with a --name of its own')


@pytest.mark.slow
def test_a_worker_that_could_not_read_tries_again(tmp_path, fleet_in, monkeypatch):
    """What it read may have been damaged on its way; the version stays what it was."""
    monkeypatch.setattr(rollout_worker, 'AVOIDED_SECONDS', 0.5)
    fleet = fleet_in(tmp_path)
    fleet.engine.faults = 2

    async def main():
        serving = asyncio.create_task(fleet.worker.serve())
        await fleet.post(0, fleet.known)
        fleet.due.finish()
        await serving
        await fleet.worker.close()

    asyncio.run(main())
    assert fleet.engine.faults == 0 and fleet.rollouts.groups() == [0]
    (report,) = fleet.due.reports()
    assert report['damaged'] == ''


def test_a_worker_whose_machine_lacks_the_model_says_so(tmp_path):
    config = tiny.get_config()
    config.policy.backend, config.model.path = 'vllm', str(tmp_path / 'model')
    with pytest.raises(
        ValueError, match=r'model\.path=.*/model is not on this machine; copy it he'
    ):
        asyncio.run(rollout_worker.start(config, str(tmp_path / 'run')))
