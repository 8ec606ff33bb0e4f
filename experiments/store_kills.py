"""Kills a process amid the writes of its stores and checkpoints, and proves that nothing was lost.

    .venv/bin/python -m experiments.store_kills --folder=FOLDER [--kills=1000] [--seed=0]

The process is a learner without a model and a worker without an engine, over the real stores: it
claims the groups that are due, writes them, takes the whole ones for a step by the ledger, counts
in its state how often it has taken each, publishes the state as weights, and saves it. It gets
SIGKILL at a random moment, anything from its first look at the folder on, and is started again. So
it goes on until it was killed often enough; then it ends by itself, and the last look must find:

* in the state, and in groups.jsonl, every group that a step took, once, and as many as the steps;
* each of these groups whole in its store, and the newest weights equal to the state;
* no claim, and no file that was not written to its end.

Each start must find a checkpoint that is not older than the last one that was said to be saved.
It prints one JSON line, or ends with what was wrong.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import random
import sys
import threading
import time
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import base
from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.run.ahead import InFlight, Ledger
from echo_jax.run.arrivals import Arrivals
from echo_jax.run.entry import Stop
from echo_jax.run.workdir import Workdir
from echo_jax.store.claims import Claims, read_claims
from echo_jax.store.kvstore import CorruptError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Task
from experiments.proof import expect
from tests.support.groups import small_group

_TASKS = [Task(f'task-{number}', None, '') for number in range(64)]
_SIZE, _MOST = 2, 1 << 16  # rollouts of a group, groups of a run
_STEPS_AFTER = 5  # that the last process makes, which nobody kills
_LIVES = 0.2, 3.0  # seconds from a start to its SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--kills', type=int, default=1000)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f'{options.folder} exists; give a folder that does not')
    context = multiprocessing.get_context('forkserver')  # which has imported everything
    context.set_forkserver_preload([Checkpointer.__module__, InFlight.__module__])
    dice, started, saved, hit = random.Random(options.seed), time.monotonic(), 0, 0
    for number in range(options.kills + 1):
        is_last = number == options.kills
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=live, args=(options.folder, theirs, saved, is_last))
        process.start()
        theirs.close()
        if not is_last:
            process.join(dice.uniform(*_LIVES))
            process.kill()
        process.join()
        if process.exitcode != (0 if is_last else -9):
            sys.exit(f'wrong: start {number} ended with {process.exitcode}; its reason is above')
        told = _told(ours)
        saved, hit = max([saved, *told]), hit + bool(told)
        if number % 50 == 0:
            print(f'{number} kills, step {saved}', file=sys.stderr, flush=True)
    process = context.Process(target=look, args=(options.folder, saved))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit('wrong: the last look failed; its reason is above')
    minutes = round((time.monotonic() - started) / 60, 1)
    told = {'kills': options.kills, 'of_which_after_a_save': hit, 'steps': saved}
    print(json.dumps(told | {'minutes': minutes}))


def _told(ours: Connection) -> list[int]:
    """The steps that a process that has ended said were saved."""
    steps = []
    try:
        while ours.poll():
            steps.append(ours.recv())
    except (EOFError, OSError):  # the last word may have been cut
        pass
    return steps


def recipe() -> ml_collections.FrozenConfigDict:
    c = base.get_config()
    c.policy.backend, c.policy.lease_sec = 'vllm', 0.5
    c.max_staleness, c.batch.groups, c.group_size = 1, 3, _SIZE
    return ml_collections.FrozenConfigDict(c)


def live(folder: pathlib.Path, told: Connection, saved: int, is_last: bool) -> None:
    """One process of the run: from the newest checkpoint until it is killed, or for a few steps."""
    work = Workdir(folder, recipe(), is_learner=True)
    checkpointer = Checkpointer(work.url('checkpoints', 'train'))
    arrivals = Arrivals(
        work, Stop(), lambda: sys.exit('the weights are damaged'), check_published=lambda: None
    )
    ahead = InFlight(_TASKS, arrivals, work.config, _MOST, Ledger(work))
    weights, done, counts = WeightStore(work.url('weights')), 0, jnp.zeros(_MOST, jnp.int32)
    abstract = {'counts': jax.ShapeDtypeStruct(counts.shape, counts.dtype)}
    arrivals.due.clear()
    if restored := checkpointer.restore(abstract):
        state, extra, done = restored
        counts = state['counts']
        ahead.set_state(extra)
    expect(done >= saved, f'step {saved} was saved, and {done} is the newest')
    last = done + _STEPS_AFTER if is_last else None  # `done` may be more than was said
    weights.rewind(done)
    weights.publish({'counts': np.asarray(counts, np.float32)}, done)
    worker = threading.Thread(target=work_for, args=(work, arrivals, weights))
    worker.start()
    try:
        while done != last:
            rollouts, _ = ahead.draw(done)
            for group_id in sorted({rollout.group_id for rollout in rollouts}):
                counts = counts.at[group_id].add(1)
            ahead.trained()
            done += 1
            weights.publish({'counts': np.asarray(counts, np.float32)}, done)
            checkpointer.save(done, {'counts': counts}, ahead.get_state())
            if done % 2 == 0:  # so that some are killed while a save is under way
                checkpointer.wait()
                told.send(done)
        checkpointer.close()
        told.send(done)
    finally:
        arrivals.due.finish()
        worker.join()
        arrivals.close()


def work_for(work: Workdir, arrivals: Arrivals, weights: WeightStore) -> None:
    """Draws the groups that are due until the run has ended."""
    claims = Claims(arrivals.due.url, 'worker', work.config.policy.lease_sec)
    store = RolloutStore(work.url('rollouts', 'train'))
    while not arrivals.due.finished():
        for due in arrivals.due.listed():
            for group_id, task_id in due.assignments:
                version = weights.latest()
                if store.missing([group_id]) and claims.take((due.store, group_id), version):
                    store.write_group(small_group(group_id, task_id, version, _SIZE))
                    claims.release((due.store, group_id))
        claims.renew()
        time.sleep(0.005)
    for group in claims.held:
        claims.release(group)


def look(folder: pathlib.Path, steps: int) -> None:
    """Ends with an error unless the run is as it would be if nobody had been killed."""
    work = Workdir(folder, recipe())
    checkpointer = Checkpointer(work.url('checkpoints', 'train'), read_only=True)
    abstract = {'counts': jax.ShapeDtypeStruct((_MOST,), jnp.int32)}
    state, _, step = checkpointer.restore(abstract)
    checkpointer.close()
    counts = np.asarray(state['counts'])
    rows = [json.loads(line) for line in (work.path / 'groups.jsonl').read_text().splitlines()]
    taken = [group_id for row in rows for group_id in row['groups']]
    expect([row['step'] for row in rows] == [*range(1, steps + 1)], 'the rows of groups.jsonl')
    expect(step == steps and counts.max() == 1, f'step {step}, counts up to {counts.max()}')
    expect(sorted(taken) == np.flatnonzero(counts).tolist(), 'the groups of state and ledger')
    expect(len(taken) == steps * work.config.batch.groups, f'{len(taken)} groups')
    try:
        groups = RolloutStore(work.url('rollouts', 'train')).read_groups(taken)
    except CorruptError as error:
        sys.exit(f'wrong: {error}')
    for group_id, group in zip(taken, groups):
        expect([r.sample_id for r in group] == [*range(_SIZE)], f'group {group_id} is not whole')
        expect(all((r.tokens == group_id).all() for r in group), f'group {group_id} is another')
    weights = WeightStore(work.url('weights'))
    expect(weights.latest() == steps, f'the newest weights are of step {weights.latest()}')
    expect((weights.read(steps)['counts'] == counts).all(), 'the newest weights')
    left = [f'claim of {group_id}' for group_id in read_claims(work.url('fleet'), 'train')]
    for pattern in ('*.partial*', '*.__lock', '*.orbax-checkpoint-tmp*'):
        left += [str(file) for file in folder.rglob(pattern)]
    expect(not left, f'left behind: {"; ".join(left[:10])}')


if __name__ == '__main__':
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    main()
