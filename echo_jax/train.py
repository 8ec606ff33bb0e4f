"""The learner's program; read it top to bottom.

    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Data flows one way: tasks, episodes, rollout store, batch, step, weight store. Run again on the same
workdir it resumes; Ctrl-C and SIGTERM save and leave.
"""

import asyncio
import dataclasses
import functools
import json
import operator
import signal
import sys
import time
from collections.abc import Coroutine, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging
from flax import nnx
from ml_collections import config_flags

from echo_jax import program, report, worker
from echo_jax.agent.policy.jax import JaxPolicy
from echo_jax.agent.protocol import Protocol
from echo_jax.agent.tasks import TaskSource, task_iterator
from echo_jax.evaluate import abstract_model, env_ce, flat_params, load_params, solve_rate
from echo_jax.learner import batching, sharding
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError
from echo_jax.learner.losses import finish_metrics
from echo_jax.learner.optimizer import make_optimizer
from echo_jax.learner.step import init_state, make_score, make_step
from echo_jax.model.qwen3 import Qwen3
from echo_jax.store.rollouts import RolloutStore, consume
from echo_jax.store.weights import WeightStore
from echo_jax.types import Role, Rollout
from echo_jax.workdir import Workdir, write_whole

LEARNED_ROLES = tuple(role for role in Role if role != Role.PROMPT)
_COUNTS = (
    *('group_size', 'batch.groups', 'batch.micro_rows', 'policy.slots'),
    *('sandbox.at_once', 'eval.samples', 'eval.every', 'checkpoint.every', 'checkpoint.keep'),
    *('warm_start.rollouts', 'warm_start.demonstrations', 'warm_start.save_every'),
)


class Stopped(Exception):
    """Asked to stop by Ctrl-C or SIGTERM: raised where the state is whole."""


class Stop:
    """Turns signals into a request that the program answers between steps and while it waits."""

    def __init__(self):
        self.requested, self._cancel = False, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_):
        self.requested = True
        if self._cancel:
            self._cancel()

    def check(self) -> None:
        if self.requested:
            raise Stopped

    def run(self, work: Coroutine) -> None:
        """Runs `work` to its end, or cancels it, sandboxes included, and raises Stopped."""

        async def cancellable():
            task = asyncio.ensure_future(work)
            loop = asyncio.get_running_loop()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
            if self.requested:  # before there was anything to cancel
                task.cancel()
            try:
                await task
            finally:
                self._cancel = None

        try:
            asyncio.run(cancellable())
        except asyncio.CancelledError:
            self.check()
            raise
        self.check()


def train(config: ml_collections.ConfigDict, work: Workdir) -> dict[str, float]:
    """Trains to the end, from where the workdir stands, and returns what summary.json holds."""
    stop = Stop()
    clock = Clock()

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
    model_config, graphdef, abstract = abstract_model(config)
    mesh = sharding.make_mesh(config)
    placed = sharding.param_shardings(abstract, mesh, config.sharding)
    init = jax.jit(
        lambda: nnx.state(Qwen3(model_config, rngs=nnx.Rngs(config.seed))), out_shardings=placed
    )
    score = jax.jit(make_score(graphdef, config.batch.micro_rows))
    programs = Programs(config, graphdef, abstract, placed, mesh)

    # ----------------------------------------------------------------------- policy and the stores
    policy = JaxPolicy(
        model_config,
        graphdef,
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
    params = init()
    if config.warm_start.steps:
        params = warm_start(config, work, params, programs, tokenizer, collect, stop, clock)

    # ------------------------------------------------------------------- where reinforcement starts
    step, abstract_state, initial_state = programs(config.optimizer)
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
                weights.publish(flat_params(state.params), done)
                version = weights.latest()
                published = jax.device_put(load_params(abstract, weights.read(version)), placed)
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
                except Stopped:
                    tasks.set_state(before)
                    raise
                drawn = time.monotonic()

                flat = [rollout for group in groups for rollout in group]
                batch = sharding.put_batch(batching.make_batch(flat, config), mesh)
                state, sums = step(state, batch, config.loss.env_coef, reference)
                values = {f'train/{k}': v for k, v in finish_metrics(sums).items()}
                require_finite(values, done + 1)
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
    except Stopped:
        save()
        raise
    finally:
        checkpointer.close()

    # ------------------------------------------------------------------------------ what it learned
    weights.publish(flat_params(state.params), done)
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
    solved = [r for r in after if r.reward >= batching.SOLVED_REWARD]
    if solved:
        report.rollout(tokenizer, solved[0])
    report.before_and_after(summary)
    return summary


def warm_start(config, work, params, programs, tokenizer, collect, stop, clock) -> nnx.State:
    """Supervised steps; the parameters that reinforcement learning starts from.

    First, plain language modelling of exploration transcripts; then, in turn with these, training
    tasks gone about by `warm_start.habits`, of which only the agent's tokens are learned. So the
    model has the format and has seen terminal output, sometimes solves and sometimes guesses or
    leaves, and has still to learn what its tasks' terminal prints. Both are rollouts: a scripted
    policy wrote them through the protocol, in real sandboxes.
    """
    options = config.warm_start
    step, abstract_state, initial_state = programs(options.optimizer)
    checkpointer = Checkpointer(work.url('checkpoints', 'warm_start'), keep=1)
    metrics = report.Metrics(work.path, 'warm_start.jsonl')
    state, done = initial_state(params), 0
    if restored := checkpointer.restore(abstract_state):
        state, extra, done = restored
        clock.resume(extra['seconds'])
    metrics.resume(done)
    if done == options.steps:
        checkpointer.close()
        return state.params

    def save():
        if checkpointer.latest() != done:
            checkpointer.save(done, state, {'seconds': clock.seconds()})

    transcripts = {}
    for name, tasks, habits in (
        ('explore', work.tasks('explore'), ['solve']),
        ('practice', work.tasks('train')[: options.demonstrations], options.habits),
    ):
        store = RolloutStore(work.url('rollouts', f'warm_start_{name}'))
        policy = worker.demonstrator(tokenizer, habits)
        transcripts[name] = write_transcripts(name, tasks, store, policy, collect, stop)

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
                    require_finite(values, done)  # also before a save: no run goes on from NaN
                    metrics.write(done, {f'train/loss_{name}': values['loss']})
                    progress.show(done, **{f'loss_{name}': values['loss']})
                if saving:
                    save()
    except Stopped:
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


def write_transcripts(name, tasks, store, policy, collect, stop) -> list[Rollout]:
    """The scripted rollout of every task, drawn unless the store has it."""
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
                policy=policy,
                group_size=1,
                temperature=1.0,
                on_group=count,
            )
        )
    return [rollout for group in store.read_groups(range(len(tasks))) for rollout in group]


def shuffled(count: int, size: int, batch: int, seed: int) -> list[int]:
    """The indices of one batch: epochs of `count` shuffled by (seed, epoch) and laid end to end."""
    places = range(batch * size, (batch + 1) * size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(count)
        for epoch in {place // count for place in places}
    }
    return [int(orders[place // count][place % count]) for place in places]


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the jitted steps of a run share."""

    config: ml_collections.ConfigDict
    graphdef: nnx.GraphDef
    abstract: nnx.State  # of the parameters
    placed: nnx.State  # their shardings
    mesh: jax.sharding.Mesh

    def __call__(self, optimizer_config: ml_collections.ConfigDict):
        """(jitted step, abstract state with shardings, function of parameters to a first state)."""
        optimizer = make_optimizer(optimizer_config)
        init = functools.partial(init_state, optimizer=optimizer)
        shapes = jax.eval_shape(init, self.abstract)
        shardings = sharding.state_shardings(shapes, self.placed, self.mesh)
        abstract_state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            shardings,
        )
        step = jax.jit(
            make_step(self.graphdef, optimizer, self.config),
            in_shardings=(shardings, sharding.batch_sharding(self.mesh), None),
            out_shardings=(shardings, None),
            donate_argnums=0,
            static_argnums=2,  # env_coef: 0 leaves the environment term out of the program
        )
        # Placed at once: arrays that lie elsewhere would have the step compiled a second time.
        return step, abstract_state, lambda params: jax.device_put(init(params), shardings)


def timed(values: dict[str, float]) -> dict[str, float]:
    """Seconds, which differ from run to run, go under `time/`; everything else repeats exactly."""
    mark = 'rollout/seconds_'
    return {
        f'time/episode_{name.removeprefix(mark)}' if name.startswith(mark) else name: value
        for name, value in values.items()
    }


def require_finite(values: dict[str, float], step: int) -> None:
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    if wrong:
        raise FloatingPointError(
            f'step {step}: {", ".join(wrong)} not finite; lower optimizer.learning_rate or look at '
            'the rollouts of this step, then run again: it resumes at the last checkpoint'
        )


def check_choices(config: ml_collections.ConfigDict) -> None:
    """Refuses what this program cannot do, or would silently ignore."""
    for key in _COUNTS:
        if (value := operator.attrgetter(key)(config)) < 1:
            raise ValueError(f'{key} is {value}; expected at least 1')
    if config.policy.backend != 'jax':
        raise ValueError(f"policy.backend is {config.policy.backend!r}; expected 'jax'")
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
    sharding.make_mesh(config)  # raises where it does not fit the devices


@dataclasses.dataclass
class Clock:
    """Seconds that a run has taken, those before a resume included."""

    started: float = dataclasses.field(default_factory=time.monotonic)
    before: float = 0.0

    def resume(self, seconds: float) -> None:
        self.before, self.started = seconds, time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    check_choices(config)  # before the workdir is this config's for good
    worker.sandbox_maker(config)  # fails now where this machine allows no sandbox
    try:
        train(config, Workdir(_WORKDIR.value, config))
    except Stopped:
        sys.exit('stopped; the same command goes on from here')


if __name__ == '__main__':
    _CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
    _WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: made, or resumed.')
    flags.mark_flags_as_required(['config', 'workdir'])
    program.run(main, CheckpointError)
