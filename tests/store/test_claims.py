"""Claims of due groups, on a real TensorStore folder, by threads and by killed processes."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from echo_jax.store.claims import Claims, NameTaken, claim_key, read_claims
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.kvstore import open_kvstore, seal

GROUP = ('train', 12)


def test_one_worker_has_a_group_until_it_gives_it_up(tmp_path):
    first, second = (Claims(tmp_path, name, lease_sec=60) for name in ('a', 'b'))
    assert first.free('train', [11, 12, 13]) == [11, 12, 13]
    assert first.take(GROUP, 0) and not second.take(GROUP, 0)
    assert second.free('train', [11, 12, 13]) == [11, 13]
    assert second.free('heldout', [12]) == [12]  # the same number of another store
    second.release(GROUP)  # which it does not have
    assert (first.held, second.held) == ({GROUP}, set()) and not second.take(GROUP, 0)
    first.release(GROUP)
    assert first.held == set() and second.take(GROUP, 3)
    (claim,) = read_claims(tmp_path, 'train').items()
    assert (claim[0], claim[1]['worker'], claim[1]['version']) == (12, 'b', 3)


def test_of_many_workers_one_has_the_group(tmp_path):
    for number in range(20):
        workers = [Claims(tmp_path, f'worker {i}', lease_sec=60) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            took = [pool.submit(worker.take, ('train', number), 0) for worker in workers]
        assert sum(each.result() for each in took) == 1


def test_a_lease_that_is_renewed_does_not_run_out(tmp_path):
    first, second = (Claims(tmp_path, name, lease_sec=0.3) for name in ('a', 'b'))
    assert first.take(GROUP, 0)
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert first.renew() == set() and not second.take(GROUP, 0)
        time.sleep(0.02)
    taken = time.monotonic()
    while not second.take(GROUP, 0):  # nobody renews it now
        assert time.monotonic() < taken + 10
        time.sleep(0.02)
    assert time.monotonic() - taken > 0.2
    assert first.renew() == {GROUP} and first.held == set()
    first.release(GROUP)
    assert second.renew() == set() and second.held == {GROUP}


def test_a_claim_runs_out_by_its_own_lease(tmp_path):
    """Each worker has its own policy.lease_sec, which may change when a run goes on."""
    patient, hasty = Claims(tmp_path, 'a', lease_sec=60), Claims(tmp_path, 'b', lease_sec=0.05)
    assert patient.take(GROUP, 0) and hasty.take(('train', 13), 0)
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        assert not hasty.take(GROUP, 0)
        time.sleep(0.01)
    assert not patient.take(('train', 13), 0)  # the first time that it sees it
    time.sleep(0.1)
    assert patient.take(('train', 13), 0)


def test_what_is_lost_is_told_even_if_the_store_fails_meanwhile(tmp_path, monkeypatch):
    claims, other = (Claims(tmp_path, name, lease_sec=0) for name in 'ab')
    groups = {('train', number) for number in range(4)}
    assert all(claims.take(group, 0) for group in groups)
    assert not any([other.take(group, 0) for group in groups])  # it sees each for the first time
    assert all([other.take(group, 0) for group in groups])
    calls = []

    def fail_the_third_time(document):
        calls.append(document)
        if len(calls) == 3:
            raise OSError('no space left on device')
        return seal(document)

    monkeypatch.setattr('echo_jax.store.claims.seal', fail_the_third_time)
    with pytest.raises(OSError, match='no space'):
        claims.renew()
    assert claims.renew() == groups


def test_groups_are_given_up_while_others_are_renewed(tmp_path):
    claims = Claims(tmp_path, 'a', lease_sec=0)  # so that each call renews all
    groups = [('train', number) for number in range(100)]
    assert all(claims.take(group, 0) for group in groups)
    with ThreadPoolExecutor(1) as pool:
        released = pool.map(claims.release, groups)
        while claims.held:
            assert claims.renew() == set()
        assert list(released) == [None] * 100
    assert read_claims(tmp_path, 'train') == {}


def test_a_worker_that_is_started_again_has_its_claims_at_once(tmp_path):
    assert Claims(tmp_path, 'a', lease_sec=60).take(GROUP, 0)
    assert not Claims(tmp_path, 'b', lease_sec=60).take(GROUP, 0)
    assert Claims(tmp_path, 'a', lease_sec=60).take(GROUP, 0)


def test_two_workers_of_one_name_do_not_steal_from_each_other_for_ever(tmp_path):
    first, second = (Claims(tmp_path, 'a', lease_sec=0) for _ in range(2))
    assert first.take(GROUP, 0) and second.take(GROUP, 0)  # it holds the first for dead
    with pytest.raises(NameTaken, match=r'another worker named a draws .* --name'):
        first.renew()
    assert first.held == set() and second.renew() == set() and second.held == {GROUP}


def test_a_group_that_is_due_no_longer_is_lost(tmp_path):
    due, store = DueGroups('train', 'train', 10, ('t',) * 3, 4, 1.0, 0), DueStore(tmp_path)
    claims = Claims(tmp_path, 'a', lease_sec=0.01)
    store.post(due)
    assert claims.take(GROUP, 0) and claims.take(('train', 13), 0)
    store.withdraw(due)
    time.sleep(0.02)
    assert claims.renew() == {GROUP} and claims.held == {('train', 13)}


def _take_for_ever(folder: str) -> None:
    while True:
        claims = Claims(folder, f'worker {os.getpid()}', lease_sec=0.05)
        for number in range(5):
            claims.take(('train', number), 0)
            claims.renew()
            claims.release(('train', number))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_killed_workers_leave_nothing_that_stays(tmp_path):
    """Workers are killed at any moment of their claims; every group can be claimed after that."""
    context = multiprocessing.get_context('spawn')
    for delay in range(6):
        processes = [context.Process(target=_take_for_ever, args=(str(tmp_path),)) for _ in '12']
        for process in processes:
            process.start()
        kvstore = open_kvstore(tmp_path)
        while not kvstore.list().result():
            time.sleep(0.01)
        time.sleep(0.01 * delay)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
    last = Claims(tmp_path, 'last', lease_sec=0.05)
    left = {('train', number) for number in range(5)}
    deadline = time.monotonic() + 10
    while left and time.monotonic() < deadline:
        left -= {group for group in left if last.take(group, 0)}
        time.sleep(0.02)
    assert not left
    assert last.free('train', range(5)) == []
    for group in last.held:
        last.release(group)
    keys = [key.decode() for key in open_kvstore(tmp_path).list().result()]
    assert not [key for key in keys if not key.endswith('.__lock')], claim_key(GROUP)
