"""Supervised steps before reinforcement learning, for a model that starts from nothing.

It trains on rollouts like the learner's program does, through the same store, batch and step.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from echo_jax.agent.collect import collect
from echo_jax.agent.dialects.dialect import Dialect
from echo_jax.agent.protocol import format_reply
from echo_jax.learner import batching, sharding
from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.learner.losses import finish_metrics
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.run import entry, report
from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import practice
from echo_jax.types import Role, Rollout, Status, Task

LEARNED_ROLES = tuple(role for role in Role if role != Role.PROMPT)


def warm_start(work, params, programs, tokenizer, protocol, stop, clock) -> nnx.State:
    """Supervised steps; the parameters that reinforcement learning starts from.

    First, plain language modelling of exploration transcripts; then, in turn with these, training
    tasks gone about by `warm_start.habits`, of which only the agent's tokens are learned. So the
    model has the format and has seen terminal output, sometimes solves and sometimes guesses or
    leaves, and has still to learn what its tasks' terminal prints. Both are rollouts: a scripted
    policy wrote them through the protocol, in real sandboxes.
    """
    config, options = work.config, work.config.warm_start
    step, abstract_state, initial_state = programs.step(options.optimizer)
    checkpointer = Checkpointer(work.url('checkpoints', 'warm_start'), keep=1)
    state, done = initial_state(params), 0
    if restored := checkpointer.restore(abstract_state):
        state, extra, done = restored
        clock.resume(extra['seconds'])
    if done == options.steps:
        checkpointer.close()
        return state.params
    work.take('warm_start.jsonl')
    metrics = report.Metrics(work.path, 'warm_start.jsonl')
    metrics.resume(done)

    def save():
        if checkpointer.latest() != done:
            work.share('warm_start.jsonl', 'tensorboard')
            checkpointer.save(done, state, {'seconds': clock.seconds()})

    draw = functools.partial(
        collect,
        config=config,
        make_sandbox=sandbox_maker(config, options.sandbox),
        protocol=protocol,
    )
    transcripts = {}
    for name, tasks, habits in (
        ('explore', work.tasks('explore'), ['solve']),
        ('practice', work.tasks('train')[: options.demonstrations], options.habits),
    ):
        store = RolloutStore(work.url('rollouts', f'warm_start_{name}'))
        policy_for = demonstrator(tokenizer, habits, protocol.dialect)
        transcripts[name] = write_transcripts(name, tasks, store, policy_for, draw, stop)

    try:
        with report.Progress('warm start', options.steps, done) as progress:
            while done < options.steps:
                stop.check()
                name, number, roles = lesson(done, options.explore_steps)
                chosen = shuffled(len(transcripts[name]), options.rollouts, number, config.seed)
                batch = batching.make_supervised_batch(
                    [transcripts[name][i] for i in chosen], config, roles
                )
                state, sums = step(state, sharding.put_batch(batch, programs.mesh), 1.0, None)
                done += 1
                saving = done % options.save_every == 0 or done == options.steps
                if saving or done % 10 == 0:
                    values = finish_metrics(sums)
                    metrics.write(done, {f'train/loss_{name}': values['loss']})
                    progress.show(done, **{f'loss_{name}': values['loss']})
                if saving:
                    save()
    except entry.Stopped:
        save()
        raise
    finally:
        checkpointer.close()
        metrics.close()
    return state.params


def lesson(done: int, explore_steps: int) -> tuple[str, int, tuple[Role, ...]]:
    """What the warm start's next step reads: (kind, its how-many-eth batch, the roles learned)."""
    since = done - explore_steps
    if since < 0:
        return 'explore', done, LEARNED_ROLES
    if since % 2:
        return 'explore', explore_steps + since // 2, LEARNED_ROLES
    return 'practice', since // 2, (Role.ACTION,)


def write_transcripts(name, tasks, store, policy_for, collect, stop) -> list[Rollout]:
    """The scripted rollouts, drawn unless the store has them, less those whose sandbox failed."""
    written = len(store.groups())
    with report.Progress(f'transcripts: {name}', len(tasks), written) as progress:

        def count(_group):
            nonlocal written
            written += 1
            progress.show(written)

        stop.run(
            collect(
                list(enumerate(tasks)),
                store,
                policy_for=policy_for,
                group_size=1,
                temperature=1.0,
                on_group=count,
            )
        )
    rollouts = [group[0] for group in store.read_groups(range(len(tasks)))]
    failed = sum(rollout.status == Status.INFRA_ERROR for rollout in rollouts)
    if failed:
        report.CONSOLE.print(f'{failed} of {len(rollouts)} transcripts left out: INFRA_ERROR')
    if failed == len(rollouts):
        raise SandboxError(f'every transcript in {store.url} is an INFRA_ERROR; see the log')
    return [rollout for rollout in rollouts if rollout.status != Status.INFRA_ERROR]


def shuffled(count: int, size: int, batch: int, seed: int) -> list[int]:
    """The indices of one batch: epochs of `count` shuffled by (seed, epoch) and laid end to end."""
    places = range(batch * size, (batch + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(count)
        for epoch in {place // count for place in places}
    }
    return [int(orders[place // count][place % count]) for place in places]


def demonstrator(
    tokenizer, habits: Sequence[str], dialect: Dialect
) -> Callable[[Task], ScriptedPolicy]:
    """Policies that replay a task's own solution, a command a turn, by the habits in turn.

    A task always gets the same habit: by the number in its id, else by the length of its id.
    """

    def policy(task: Task) -> ScriptedPolicy:
        digits = re.search(r'\d+', task.task_id)
        number = int(digits[0]) if digits else len(task.task_id)
        turns = practice(task, habits[number % len(habits)])
        return ScriptedPolicy(tokenizer, [format_reply(*turn, dialect) for turn in turns])

    return policy
