"""The learner's program; read it top to bottom.

    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Data flows one way: tasks, episodes, rollout store, batch, step, weight store. Run again on the same
workdir it resumes; Ctrl-C and SIGTERM save and leave.
"""

import functools
import json
import operator
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from echo_jax import program, report, worker
from echo_jax.agent.policy.jax import JaxPolicy
from echo_jax.agent.protocol import Protocol
from echo_jax.agent.tasks import TaskSource, task_iterator
from echo_jax.evaluate import env_ce, solve_rate
from echo_jax.learner import batching, distributed, sharding
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.step import Programs
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.store.rollouts import RolloutStore, consume
from echo_jax.store.weights import WeightStore
from echo_jax.types import SOLVED_REWARD, Rollout
from echo_jax.warm_start import warm_start
from echo_jax.workdir import Workdir, read_tokenizer, write_whole

_COUNTS = (
    *('group_size', 'batch.groups', 'batch.micro_rows', 'policy.slots'),
    *('sandbox.at_once', 'eval.samples', 'eval.every', 'checkpoint.every', 'checkpoint.keep'),
    *('warm_start.rollouts', 'warm_start.demonstrations', 'warm_start.save_every'),
)


def train(config: ml_collections.ConfigDict, work: Workdir) -> dict[str, float]:
    """Trains to the end, from where the workdir stands, and returns what summary.json holds."""
    stop = program.Stop()
    clock = program.Clock()

    # --------------------------------------------------------------- tasks and their conversation
    report.heading(f'Tasks and tokenizer in {work.path}')
    tokenizer = work.tokenizer()
    protocol = Protocol(tokenizer, config.protocol)
    limits = lambda text: len(protocol.prompt_ids(text)), config.protocol.max_prompt_tokens
    source = TaskSource(work.tasks('train'), *limits)
    heldout = TaskSource(work.tasks('heldout'), *limits)
    tasks = task_iterator(source, seed=config.seed, groups=config.batch.groups)
    report.CONSOLE.print(
        f'{len(source)} training and {len(heldout)} held-out tasks; '
        f'{source.dropped + heldout.dropped} prompts over {limits[1]} tokens dropped'
    )

    # ------------------------------------------------------------------ model, mesh and programs
    programs = Programs.of(config)
    mesh, score = programs.mesh, programs.score()

    # ----------------------------------------------------------------------- policy and the stores
    policy = JaxPolicy(
        programs.model,
        programs.graphdef,
        slots=config.policy.slots,
        cache_tokens=config.protocol.max_total_tokens,
    )
    weights = WeightStore(work.url('weights'))
    collect = functools.partial(
        worker.collect,
        config=config,
        make_sandbox=worker.sandbox_maker(config),
        protocol=protocol,
    )

    def draw(
        params, version, tasks_, store, group_ids, samples, temperature
    ) -> list[list[Rollout]]:
        """Groups `group_ids` of `tasks_`, drawn with these weights unless the store has them."""

        async def sample():
            await policy.load(params, version)
            for wave in worker.waves(zip(group_ids, tasks_), samples, config.policy.slots):
                await collect(
                    wave, store, policy=policy, group_size=samples, temperature=temperature
                )

        stop.run(sample())
        return store.read_groups(group_ids)

    def evaluate(params, version, name) -> list[Rollout]:
        store = RolloutStore(work.url('rollouts', name))
        drawn = draw(
            params,
            version,
            heldout.tasks,
            store,
            range(len(heldout)),
            config.eval.samples,
            config.eval.temperature,
        )
        return [rollout for group in drawn for rollout in group]

    # -------------------------------------------------------------------------------- warm start
    if path := config.model.path:
        params = huggingface.load_params(path, programs.abstract, programs.placed)
    else:
        params = programs.random_params()
    if config.warm_start.steps:
        params = warm_start(config, work, params, programs, tokenizer, collect, stop, clock)

    # ------------------------------------------------------------------- where reinforcement starts
    step, abstract_state, initial_state = programs.step(config.optimizer)
    reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coef else None
    checkpointer = Checkpointer(work.url('checkpoints', 'train'), keep=config.checkpoint.keep)
    metrics = report.Metrics(work.path)
    if restored := checkpointer.restore(abstract_state):
        state, extra, done = restored
        tasks.set_state(extra['tasks'])
        cursor = extra['cursor']
        clock.resume(extra['seconds'])
        report.CONSOLE.print(f'resumed at step {done} of {config.num_steps}')
    else:
        state, cursor, done = initial_state(params), None, 0
    metrics.resume(done)
    weights.rewind(done)
    rollouts = RolloutStore(work.url('rollouts', 'train'))
    fixed = evaluate(params, 0, 'heldout_before')  # drawn once, from the warm-started model
    solved_before, ce_before = solve_rate(fixed), env_ce(score, params, fixed, config)['all']
    del params

    # ---------------------------------------------------------------------- reinforcement learning
    def save():
        if checkpointer.latest() != done:
            extra = {'tasks': tasks.get_state(), 'cursor': cursor, 'seconds': clock.seconds()}
            checkpointer.save(done, state, extra)

    try:
        with report.Progress('train', config.num_steps, done) as progress:
            while done < config.num_steps:
                stop.check()
                started = time.monotonic()
                weights.publish(model_params.flatten(state.params), done)
                version = weights.latest()
                published = jax.device_put(
                    model_params.unflatten(programs.abstract, weights.read(version)),
                    programs.placed,
                )
                group_ids = range(done * config.batch.groups, (done + 1) * config.batch.groups)
                before = tasks.get_state()
                try:
                    groups = draw(
                        published,
                        version,
                        next(tasks),
                        rollouts,
                        group_ids,
                        config.group_size,
                        config.policy.temperature,
                    )
                except program.Stopped:
                    tasks.set_state(before)
                    raise
                drawn = time.monotonic()

                flat = [rollout for group in groups for rollout in group]
                batch = sharding.put_batch(batching.make_batch(flat, config), mesh)
                state, sums = step(state, batch, config.loss.env_coef, reference)
                values = {f'train/{k}': v for k, v in finish_metrics(sums).items()}
                done += 1
                cursor = consume(cursor, group_ids)

                values |= timed(batching.rollout_metrics(flat, version))
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
    except program.Stopped:
        save()
        raise
    finally:
        checkpointer.close()

    # ------------------------------------------------------------------------------ what it learned
    weights.publish(model_params.flatten(state.params), done)
    after = evaluate(state.params, done, 'heldout_after')
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
    write_whole(work.path / 'summary.json', json.dumps(summary, indent=1))
    metrics.close()
    rows = [{'step': 0, 'eval/solve_rate': solved_before, 'eval/env_ce': ce_before}]
    rows += [
        *metrics.rows(),
        {'step': done, 'eval/solve_rate': summary['solve_rate_after'], 'eval/env_ce': ce_after},
    ]
    report.curves(work.path / 'curves.png', rows)
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


def check_choices(config: ml_collections.ConfigDict) -> None:
    """Refuses what this program cannot do, or would silently ignore."""
    for key in _COUNTS:
        if (value := operator.attrgetter(key)(config)) < 1:
            raise ValueError(f'{key} is {value}; expected at least 1')
    if config.policy.backend != 'jax':
        raise ValueError(
            f"policy.backend is {config.policy.backend!r}; only 'jax' is there yet: add "
            '--config.policy.backend=jax --config.sandbox.backend=local'
        )
    if (count := jax.process_count()) > 1:
        raise ValueError(
            f"this learner has {count} processes, but policy.backend='jax' samples in one; start "
            'it on one host'
        )
    if config.max_staleness != 0:
        raise ValueError(
            f'max_staleness is {config.max_staleness}; the embedded policy samples every step from '
            'the weights that it updates, set it to 0'
        )
    if config.batch.seq_len < config.protocol.max_total_tokens:
        raise ValueError(
            f'batch.seq_len={config.batch.seq_len} cannot hold a rollout of '
            f'protocol.max_total_tokens={config.protocol.max_total_tokens}; raise it'
        )
    if config.policy.slots < (size := max(config.group_size, config.eval.samples)):
        raise ValueError(
            f'policy.slots={config.policy.slots} cannot hold a group of {size} rollouts; raise it'
        )
    if not 0 <= config.warm_start.explore_steps <= config.warm_start.steps:
        raise ValueError(
            f'warm_start.explore_steps={config.warm_start.explore_steps} is not among the '
            f'warm_start.steps={config.warm_start.steps}'
        )
    model = Programs.of(config).model  # raises where it does not fit the mesh
    if path := config.model.path:
        huggingface.check_tokenizer(read_tokenizer(path), model)


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    distributed.start()
    check_choices(config)  # before the workdir is this config's for good
    worker.sandbox_maker(config)  # fails now where this machine allows no sandbox
    try:
        train(config, Workdir(_WORKDIR.value, config))
    except program.Stopped:
        sys.exit('stopped; the same command goes on from here')


if __name__ == '__main__':
    _CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: made, or resumed.')
    flags.mark_flags_as_required(['config', 'workdir'])
    program.run(main, CheckpointError)
