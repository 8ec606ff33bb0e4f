"""The parameters that reinforcement learning starts from, and the supervised steps before it.

The warm start trains on rollouts through the same store, packing and model as the learner's program
does, with a loss of its own: cross-entropy, on which no option of the recipe's `loss` acts. A
scripted policy wrote the rollouts through the protocol, in real sandboxes.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
import transformers
from flax import nnx

from echo_jax.agent.collect import collect
from echo_jax.agent.dialects.dialect import Dialect
from echo_jax.agent.protocol import Protocol, format_reply
from echo_jax.learner import batching, sharding
from echo_jax.learner.checkpoint import Checkpointer
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.policy.scripted import ScriptedPolicy
from echo_jax.run import entry, report
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox import SandboxError
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.rollouts import RolloutStore
from echo_jax.tasks.generate import practice
from echo_jax.types import Role, Rollout, Status, Task

LEARNED_ROLES = tuple(role for role in Role if role != Role.PROMPT)
LOG_EVERY = 5  # steps; an odd number, since practice and exploration take turns


def first_params(
    work: Workdir,
    model: ShardedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    protocol: Protocol,
    stop: entry.Stop,
    clock: entry.Clock,
) -> nnx.State:
    """What reinforcement learning starts from: `model.path` or random, then the warm start."""
    path = work.config.model.path
    if path:
        params = huggingface.load_params(path, model.abstract, model.placed)
    else:
        params = model.random_params()
    if work.config.warm_start.steps:
        params = warm_start(work, params, model, tokenizer, protocol, stop, clock)
    return params


def warm_start(
    work: Workdir,
    params: nnx.State,
    model: ShardedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    protocol: Protocol,
    stop: entry.Stop,
    clock: entry.Clock,
) -> nnx.State:
    """The parameters after `warm_start.steps` supervised steps, which resume like a run.

    First comes plain language modelling of exploration transcripts. Then these alternate with
    training tasks that are gone about by `warm_start.habits`, of which only the agent's tokens are
    learned. So the model knows the format and has seen terminal output; it sometimes solves a task
    and sometimes guesses or leaves, and has still to learn what its tasks' terminal prints.
    """
    config, options = work.config, work.config.warm_start
    step, abstract_state, initial_state = model.supervised_step(options.optimizer)
    checkpointer = Checkpointer(work.url('checkpoints', 'warm_start'), keep=1)
    state, done = initial_state(params), 0
    restored = checkpointer.restore(abstract_state)
    if restored is not None:
        state, extra, done = restored
        clock.resume(extra['seconds'])
    if done == options.steps:
        checkpointer.close()
        return state.params
    work.take('warm_start.jsonl')
    metrics = report.Metrics(work.path, 'warm_start.jsonl')
    metrics.resume(done)
    transcripts = write_transcripts(work, tokenizer, protocol, stop)

    def save():
        if checkpointer.latest() != done:
            work.share('warm_start.jsonl', 'tensorboard')
            checkpointer.save(done, state, {'seconds': clock.seconds()})

    try:
        with report.Progress('warm start', options.steps, done) as progress:
            while done < options.steps:
                stop.check()
                name, number, roles = lesson(done, options.explore_steps)
                chosen = shuffled(len(transcripts[name]), options.rollouts, number, config.seed)
                batch = batching.make_supervised_batch(
                    [transcripts[name][i] for i in chosen], config, roles
                )
                state, sums = step(state, sharding.put_batch(batch, model.mesh))
                done += 1
                saving = done % options.save_every == 0 or done == options.steps
                if saving or done % LOG_EVERY == 0:
                    values = finish_metrics(sums)
                    metrics.write(done, {f'train/{key}_{name}': v for key, v in values.items()})
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
    """What the next step of the warm start reads: (transcripts, number of the batch, roles)."""
    since = done - explore_steps
    if since < 0:
        return 'explore', done, LEARNED_ROLES
    if since % 2:
        return 'explore', explore_steps + since // 2, LEARNED_ROLES
    return 'practice', since // 2, (Role.ACTION,)


def write_transcripts(
    work: Workdir,
    tokenizer: transformers.PreTrainedTokenizerFast,
    protocol: Protocol,
    stop: entry.Stop,
) -> dict[str, list[Rollout]]:
    """The scripted rollouts, 'explore' and 'practice'; those in the store are not drawn again.

    If all steps are of exploration there is no practice, and no training task is gone about.
    Rollouts whose sandbox failed are left out. Raises SandboxError if all of them failed.
    """
    config, options = work.config, work.config.warm_start
    tasks = {'explore': work.tasks('explore')}
    if options.explore_steps < options.steps:
        tasks['practice'] = work.tasks('train')[: options.demonstrations]
    # Nobody reads a transcript's reward, and tests are a third of what it costs.
    untested = {
        name: [dataclasses.replace(task, environment_only=True) for task in some]
        for name, some in tasks.items()
    }
    habits = {'explore': ['solve'], 'practice': options.habits}
    transcripts = {}
    with sandbox_maker(config, options.sandbox) as make_sandbox:
        for name in tasks:
            draw = functools.partial(
                collect,
                list(enumerate(untested[name])),
                config=config,
                make_sandbox=make_sandbox,
                protocol=protocol,
                policy_for=demonstrator(tokenizer, habits[name], protocol.dialect),
                group_size=1,
                temperature=1.0,
            )
            store = RolloutStore(work.url('rollouts', f'warm_start_{name}'))
            transcripts[name] = _drawn(name, len(tasks[name]), store, draw, stop)
    return transcripts


def _drawn(
    name: str, count: int, store: RolloutStore, draw: Callable, stop: entry.Stop
) -> list[Rollout]:
    written = len(store.groups())
    with report.Progress(f'transcripts: {name}', count, written) as progress:

        def on_group(_group: list[Rollout]) -> None:
            nonlocal written
            written += 1
            progress.show(written)

        stop.run(draw(store=store, on_group=on_group))
    rollouts = [group[0] for group in store.read_groups(range(count))]
    usable = [rollout for rollout in rollouts if rollout.status != Status.INFRA_ERROR]
    if not usable:
        store.remove(range(count))  # or the same command would find nothing else to do
        raise SandboxError(f'every transcript in {store.url} is an INFRA_ERROR; see the log')
    if len(usable) < count:
        report.CONSOLE.print(f'{count - len(usable)} of {count} transcripts left out: INFRA_ERROR')
    return usable


def shuffled(count: int, size: int, batch: int, seed: int) -> list[int]:
    """The indices of one batch, out of epochs of `count` that are shuffled by (seed, epoch).

    Grain, which draws the tasks, could shuffle here too. This stays by hand because it needs no
    state to resume: a batch is a function of its number; and because grain's order is another, so
    that recorded runs would no longer repeat.
    """
    places = range(batch * size, (batch + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(count)
        for epoch in {place // count for place in places}
    }
    return [int(orders[place // count][place % count]) for place in places]


def demonstrator(
    tokenizer: transformers.PreTrainedTokenizerFast, habits: Sequence[str], dialect: Dialect
) -> Callable[[Task], ScriptedPolicy]:
    """A function that makes the policy of a task: it replays the task's own solution by a habit.

    A task always gets the same habit: by the number in its id, else by the length of its id.
    """

    def policy(task: Task) -> ScriptedPolicy:
        digits = re.search(r'\d+', task.task_id)
        number = int(digits[0]) if digits else len(task.task_id)
        turns = practice(task, habits[number % len(habits)])
        return ScriptedPolicy(tokenizer, [format_reply(*turn, dialect) for turn in turns])

    return policy
