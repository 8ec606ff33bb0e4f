"""The learner's program; read it top to bottom.

    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Data flows one way: tasks, episodes, rollout store, batch, step, weight store. Run again on the same
workdir it resumes; Ctrl-C and SIGTERM save and leave.
"""

import collections
import json
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from echo_jax.agent.protocol import Protocol
from echo_jax.learner import batching, distributed, sharding
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError, check_reach
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import Programs
from echo_jax.model import huggingface
from echo_jax.run import entry, report
from echo_jax.run.checks import check_choices, sandboxes_here
from echo_jax.run.measures import env_ce, solve_rate
from echo_jax.run.sources import make_source
from echo_jax.run.warm_start import warm_start
from echo_jax.run.workdir import Workdir, write_whole
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.due import DueGroups
from echo_jax.store.rollouts import consume
from echo_jax.store.weights import WeightStore
from echo_jax.tasks.drawing import TaskIterator, TaskSource
from echo_jax.types import SOLVED_REWARD, Rollout

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder or gs:// URL of the run: made, or resumed.')
flags.mark_flags_as_required(['config', 'workdir'])


def train(config: ml_collections.ConfigDict, work: Workdir) -> dict[str, float]:
    """Trains to the end, from where the workdir stands, and returns what summary.json holds."""
    stop = entry.Stop()
    clock = entry.Clock()

    # --------------------------------------------------------------- tasks and their conversation
    report.heading(f'Tasks and tokenizer in {work.url()}')
    with distributed.leader_first('tasks'):  # which it may have to make
        tokenizer = work.tokenizer()
        protocol = Protocol(tokenizer, config.protocol)
        limits = lambda text: len(protocol.prompt_ids(text)), config.protocol.max_prompt_tokens
        source = TaskSource(work.tasks('train'), *limits)
        heldout = TaskSource(work.tasks('heldout'), *limits)
    tasks = TaskIterator(source, seed=config.seed, groups=config.batch.groups)
    report.CONSOLE.print(
        f'{len(source)} training and {len(heldout)} held-out tasks; '
        f'{source.dropped + heldout.dropped} prompts over {limits[1]} tokens dropped'
    )

    # ------------------------------------------------------------------ model, mesh and programs
    programs = Programs.of(config)
    mesh, score = programs.mesh, programs.score()

    # -------------------------------------------------------------- where the rollouts are sampled
    splits = {'train': source, 'heldout': heldout}
    source_ = make_source(work, programs, tokenizer, protocol, splits, stop)

    def evaluate(version, name) -> list[Rollout]:
        due = DueGroups(
            store=name,
            split='heldout',
            first_group=0,
            task_ids=tuple(task.task_id for task in heldout),
            group_size=config.eval.samples,
            temperature=config.eval.temperature,
            version=version,
        )
        source_.post(due)
        return [rollout for group in source_.wait(due) for rollout in group]

    # -------------------------------------------------------------------------------- warm start
    if path := config.model.path:
        params = huggingface.load_params(path, programs.abstract, programs.placed)
    else:
        params = programs.random_params()
    if config.warm_start.steps:
        params = warm_start(work, params, programs, tokenizer, protocol, stop, clock)

    # ------------------------------------------------------------------- where reinforcement starts
    step, abstract_state, initial_state = programs.step(config.optimizer)
    reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coef else None
    checkpointer = Checkpointer(work.url('checkpoints', 'train'), keep=config.checkpoint.keep)
    if distributed.leads():
        work.take('metrics.jsonl')
    metrics = report.Metrics(work.path, writes=distributed.leads())
    if restored := checkpointer.restore(abstract_state):
        state, extra, done = restored
        tasks.set_state(extra['tasks'])
        cursor = extra['cursor']
        clock.resume(extra['seconds'])
        report.CONSOLE.print(f'resumed at step {done} of {config.num_steps}')
    else:
        state, cursor, done = initial_state(params), None, 0
    metrics.resume(done)
    if distributed.leads():
        WeightStore(work.url('weights')).rewind(done)
    source_.publish(state.params, done)
    fixed = evaluate(0, 'heldout_before')  # drawn once, from the warm-started model
    solved_before, ce_before = solve_rate(fixed), env_ce(score, params, fixed, config)['all']
    del params

    # ---------------------------------------------------------------------- reinforcement learning
    upcoming = collections.deque()  # (position of the tasks, round) of this step and those ahead

    def save():
        if checkpointer.latest() != done:
            if distributed.leads():  # before it, so that no checkpoint is there without its rows
                work.share('metrics.jsonl', 'tensorboard')
            position = upcoming[0][0] if upcoming else tasks.get_state()
            extra = {'tasks': position, 'cursor': cursor, 'seconds': clock.seconds()}
            checkpointer.save(done, state, extra)

    def look_ahead():
        """Posts the rounds of this step and of the `max_staleness` after it."""
        last = min(done + config.max_staleness, config.num_steps - 1)
        for number in range(done + len(upcoming), last + 1):
            position, drawn = tasks.get_state(), next(tasks)
            due = DueGroups(
                store='train',
                split='train',
                first_group=number * config.batch.groups,
                task_ids=tuple(task.task_id for task in drawn),
                group_size=config.group_size,
                temperature=config.policy.temperature,
                version=done,
            )
            upcoming.append((position, due))
            source_.post(due)

    try:
        with report.Progress('train', config.num_steps, done) as progress:
            while done < config.num_steps:
                started = time.monotonic()
                look_ahead()
                groups = source_.wait(upcoming[0][1])
                drawn = time.monotonic()

                flat = [rollout for group in groups for rollout in group]
                batch = sharding.put_batch(batching.make_batch(flat, config), mesh)
                state, sums = step(state, batch, config.loss.env_coef, reference)
                values = {f'train/{k}': v for k, v in finish_metrics(sums).items()}
                cursor = consume(cursor, upcoming.popleft()[1].group_ids)
                values |= timed(batching.rollout_metrics(flat, done))
                done += 1
                source_.publish(state.params, done)

                values |= {
                    'time/sampling': drawn - started,
                    'time/learning': time.monotonic() - drawn,
                }
                if done % config.eval.every == 0 and done < config.num_steps:
                    values['eval/env_ce'] = env_ce(score, state.params, fixed, config)['all']
                metrics.write(done, values)
                if done % config.checkpoint.every == 0:
                    save()
                progress.show(
                    done,
                    reward=values['rollout/reward'],
                    env_ce=values.get('train/env_ce', float('nan')),
                )
        save()
    except entry.Stopped:
        save()
        raise
    finally:
        checkpointer.close()

    # ------------------------------------------------------------------------------ what it learned
    after = evaluate(done, 'heldout_after')
    source_.close()
    ce_after = env_ce(score, state.params, fixed, config)['all']
    summary = {
        'solve_rate_before': solved_before,
        'solve_rate_after': solve_rate(after),
        'env_ce_before': ce_before,
        'env_ce_after': ce_after,
        'steps': done,
        'rollouts': done * config.batch.groups * config.group_size,
        'train_minutes': clock.seconds() / 60,
    }
    metrics.close()
    if not distributed.leads():
        return summary
    write_whole(work.path / 'summary.json', json.dumps(summary, indent=1))
    rows = [{'step': 0, 'eval/solve_rate': solved_before, 'eval/env_ce': ce_before}]
    rows += [
        *metrics.rows(),
        {'step': done, 'eval/solve_rate': summary['solve_rate_after'], 'eval/env_ce': ce_after},
    ]
    report.curves(work.path / 'curves.png', rows)
    work.share('metrics.jsonl', 'tensorboard', 'curves.png', 'summary.json')
    solved = [r for r in after if r.reward >= SOLVED_REWARD]
    if solved:
        report.rollout(tokenizer, solved[0])
    report.before_and_after(summary)
    return summary


def timed(values: dict[str, float]) -> dict[str, float]:
    """Seconds, which differ from run to run, go under `time/`; everything else repeats exactly."""
    mark = 'rollout/seconds_'
    return {
        f'time/episode_{name.removeprefix(mark)}' if name.startswith(mark) else name: value
        for name, value in values.items()
    }


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    distributed.start()
    check_choices(config)  # before the workdir is this config's for good
    check_reach(_WORKDIR.value)
    for backend in sandboxes_here(config):
        sandbox_maker(config, backend).close()  # fails now where this machine allows none
    report.CONSOLE.quiet = not distributed.leads()
    with distributed.leader_first('workdir'):
        work = Workdir(_WORKDIR.value, config)
    try:
        train(config, work)
    except entry.Stopped:
        sys.exit('stopped; the same command goes on from here')


if __name__ == '__main__':
    entry.run(main, CheckpointError)
