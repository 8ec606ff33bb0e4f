"""Removes what a run no longer keeps: old rollouts, and what a run that goes on is past. No JAX.

Whatever a resumed run may read again stays: what steps after the oldest save trained on. So do the
held-out rollouts from before and after training, and the transcripts of the warm start.
"""

import re

from echo_jax.run import report
from echo_jax.run.changes import said
from echo_jax.run.numbering import Steps
from echo_jax.run.workdir import Workdir
from echo_jax.store.kvstore import inside, open_kvstore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore

_GROUP = re.compile(rb'rollouts/(train|heldout_(\d{6,}))/groups/(\d{12})')


def remove_old_rollouts(work: Workdir, done: int, oldest_save: int | None) -> None:
    """Removes the groups of steps, and of evaluations between them, that are too old to keep.

    done: the number of steps. oldest_save: the step of the oldest checkpoint that is on disk.
    """
    kept = work.config.logging.rollouts
    if kept is None or oldest_save is None:
        return
    last = min(done - kept, oldest_save)  # the last step whose groups go
    steps = Steps(work.config)
    steps.read(open_kvstore(work.path))
    old: dict[str, list[int]] = {}
    for key in open_kvstore(work.url()).list(inside('rollouts')).result():
        if not (match := _GROUP.fullmatch(key)):
            continue
        store, version, group_id = match[1].decode(), match[2], int(match[3])
        # An evaluation is waited for until the next one at the latest, and a save before that one
        # may say that it is still to come.
        step = int(version) + work.config.eval.every if version else steps.decided(group_id)
        if step is not None and step <= last:
            old.setdefault(store, []).append(group_id)
    for store, group_ids in old.items():
        RolloutStore(work.url('rollouts', store)).remove(group_ids)


def go_on(work: Workdir, done: int, num_steps: int) -> None:
    """Makes a workdir that of a run with `done` steps, for the leading process of its learner.

    It says what the config changes from here on, and removes what only a run that has come to its
    end has, if it is longer now, and the weights of later steps.
    """
    if done:
        report.CONSOLE.print(f'resumed at step {done} of {num_steps}')
    if changes := work.go_on(done):
        report.CONSOLE.print(f'from step {done} on: {said(changes)}', soft_wrap=True)
    if done < num_steps:
        store = RolloutStore(work.url('rollouts', 'heldout_after'))
        store.remove(store.groups())
        work.remove('summary.json', 'curves.png')
    # The embedded policy reads them as they are published: so the newest are never damaged ones.
    last = done if work.config.policy.backend == 'vllm' else done - 1
    WeightStore(work.url('weights')).rewind(last)
