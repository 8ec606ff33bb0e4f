"""What a learner does about what is damaged in its stores, and about weights that do not go out."""

import pathlib
import threading

import numpy as np
import pytest

from echo_jax.run import arrivals
from echo_jax.run.ahead import Ledger
from echo_jax.run.entry import Stopped
from echo_jax.run.numbering import LEDGER
from echo_jax.run.publishing import Publishing
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Claims, claim_key
from echo_jax.store.weights import UNREADABLE, WeightStore
from tests.support.ahead_run import Run, begun, recipe
from tests.support.buckets import serving
from tests.support.groups import small_group
from tests.support.small_run import wait_for

ARRAYS = {'a': np.ones(3, np.float32)}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(arrivals, 'REPORTS_SECONDS', 0.1)


def spoil(folder: pathlib.Path, pattern: str) -> None:
    """Flips a bit in the middle of each of these files."""
    for file in folder.glob(pattern):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


def damage(run: Run, group_id: int) -> None:
    spoil(run.work.path, f'rollouts/train/groups/{group_id:012d}')


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


def republishing(run: Run) -> tuple[WeightStore, list]:
    """The weights of version 0, and those that the run's learner publishes again, which its groups
    0 and 1 then follow.
    """
    weights, again = WeightStore(run.work.url('weights')), []
    weights.publish(ARRAYS, 0)

    def publish_again():
        weights.rewind(-1)
        weights.publish(ARRAYS, 0)
        again.append(weights.newest())
        run.write(0, 1)

    run.arrivals.publish_again = publish_again
    begun(run)
    return weights, again


def test_weights_that_a_worker_finds_damaged_go_out_again(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    weights, again = republishing(run)
    first = weights.newest()
    spoil(run.work.path / 'weights', 'data/*/*/0000/c*')
    run.due.report('worker', {'version': 0, 'drawing': 0, 'damaged': first[1]})
    assert run.step()[0] == [0, 1]
    assert len(again) == 1 and again[0] != first  # the report that is left is of the old ones


def test_a_damaged_manifest_goes_out_again_whoever_has_seen_it(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    weights, again = republishing(run)
    spoil(run.work.path / 'weights', 'manifests/*')
    assert weights.newest() == (0, UNREADABLE)
    assert run.step()[0] == [0, 1] and len(again) == 1


def test_weights_that_one_worker_alone_cannot_read_stay(tmp_path, capsys):
    """Its network fails; the others would have to read them again, and again."""
    run = Run(tmp_path / 'run', recipe())
    weights, again = republishing(run)
    run.due.report('far', {'version': 0, 'drawing': 0, 'damaged': weights.newest()[1]})
    threading.Timer(1.0, lambda: run.write(0, 1)).start()
    assert run.step()[0] == [0, 1] and again == []
    told = ' '.join(capsys.readouterr().out.split())
    assert told.count('far cannot read version 0 of the weights, but it is sound') == 1


def test_weights_that_cannot_be_written_end_the_wait_for_their_groups(tmp_path):
    publishing = Publishing()
    run = Run(tmp_path / 'run', recipe(), check_published=publishing.check)

    def write():
        raise OSError('No space left on device')

    begun(run)
    publishing.begin(write)
    with pytest.raises(OSError, match='No space left'):
        run.step()


def test_what_is_posted_is_posted_again_if_it_is_damaged(tmp_path, capsys):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    spoil(run.work.path / 'fleet', 'due/train/*')
    assert run.due.listed() == []

    def draw():
        wait_for(lambda: run.due.listed() != [])
        run.write(0, 1)

    worker = threading.Thread(target=draw)
    worker.start()
    assert run.step()[0] == [0, 1]
    worker.join()
    assert 'it is posted again' in ' '.join(capsys.readouterr().out.split())


def test_damaged_claims_and_reports_are_as_good_as_none(tmp_path):
    run = Run(tmp_path / 'run', recipe())
    begun(run)
    run.due.report('worker', {'version': 0, 'drawing': 0})
    claims = Claims(run.due.url, 'worker', lease_sec=0.0)
    assert claims.take(('train', 0), 0)
    spoil(run.work.path / 'fleet', 'workers/*')
    spoil(run.work.path / 'fleet', claim_key(('train', 0)))
    threading.Timer(0.5, lambda: run.write(0, 1)).start()
    assert run.step()[0] == [0, 1]  # it has looked at both in the meantime
    other = Claims(run.due.url, 'other', lease_sec=60.0)
    assert other.take(('train', 0), 0)  # without waiting for a lease
    assert claims.renew() == {('train', 0)} and claims.held == set()


def test_what_was_dropped_before_a_stop_is_in_the_ledger(tmp_path):
    run = Run(tmp_path / 'run', recipe(staleness=1))
    for _ in range(2):
        begun(run)
        run.write(*run.wanted()[1:3])
        run.step()
    run.write(0, version=0)  # too old for weights 2

    def stop():
        wait_for(lambda: 0 not in [i for due in run.due.listed() for i in due.group_ids])
        run.stop.requested = True

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Stopped):
        run.step()
    stopping.join()
    run.start(run.ahead.get_state(), run.done)

    def draw():
        wait_for(lambda: len(run.wanted()) > 1)
        run.write(*run.wanted()[:2])

    worker = threading.Thread(target=draw)
    worker.start()
    values = run.step()[1]
    worker.join()
    assert values['rollout/late_groups'] == 1
    assert '"dropped": [0]' in (run.work.path / 'groups.jsonl').read_text()


def test_a_ledger_in_a_bucket_keeps_what_was_written_after_the_last_save(tmp_path, monkeypatch):
    def steps(machine: str) -> tuple[Workdir, Ledger, list[int]]:
        """A process on this machine: its workdir, its ledger, and the steps that are in that."""
        monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / machine))
        work = Workdir('gs://bucket/run', recipe())
        ledger = Ledger(work)
        return work, ledger, [step for step in range(1, 9) if ledger.find(step)]

    with serving() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        work, ledger, _ = steps('first')
        ledger.write(1, [0, 1], [])
        work.share(LEDGER)
        for step in (2, 3, 4):  # it has no save after these, and is killed
            ledger.write(step, [step, step + 9], [])
        assert steps('first')[2] == [1, 2, 3, 4]
        work, ledger, found = steps('second')
        assert found == [1]
        for step in (2, 3):
            ledger.write(step, [2 * step, 2 * step + 1], [])
        work.share(LEDGER)
        _, ledger, found = steps('first')
        # Its own fourth step is of a life that the run has not had.
        assert found == [1, 2, 3] and ledger.find(2)['groups'] == [4, 5]
