"""The learner's program; read it top to bottom.

    python -m echo_jax.train --config=configs/tiny.py --workdir=runs/tiny

Data flows one way: tasks, episodes, rollout store, batch, step, weight store. The same command on
the same workdir resumes the run. Ctrl-C and SIGTERM save the state and end the program.
"""

import contextlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from echo_jax.agent.protocol import Protocol
from echo_jax.learner import distributed, env_coef
from echo_jax.learner.checkpoint import Checkpointer, CheckpointError, check_reach
from echo_jax.learner.step import ShardedModel
from echo_jax.run import entry, report
from echo_jax.run.ahead import groups_ahead
from echo_jax.run.checks import check_config, sandboxes_here
from echo_jax.run.env_term import EnvTerm
from echo_jax.run.heldout import Heldout
from echo_jax.run.inert import inert_keys
from echo_jax.run.learning import Learner
from echo_jax.run.measures import headline
from echo_jax.run.numbering import LEDGER
from echo_jax.run.pace import Pace
from echo_jax.run.redraw import redraw_equal
from echo_jax.run.retention import go_on, remove_old_rollouts
from echo_jax.run.sources import count_steps, make_source, read_splits
from echo_jax.run.warm_start import first_params
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.scores import ScoreStore

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder or gs:// URL of the run: made, or resumed.', required=True
)
flags.mark_flag_as_required('config')


def train(config: ml_collections.ConfigDict, work: Workdir) -> dict[str, float]:
    """Trains to the end, from where the workdir stands, and returns what summary.json holds."""
    stop, clock, leads = entry.Stop(), entry.Clock(), distributed.leads()

    # --------------------------------------------------------------- tasks and their conversation
    report.heading(f'Tasks and tokenizer in {work.url()}')
    with distributed.leader_first('tasks'):  # the leader may have to make them
        tokenizer = work.tokenizer()
        protocol = Protocol(tokenizer, config.protocol)
        splits = read_splits(work, protocol)
    num_steps = count_steps(config, len(splits['train']))

    # ---------------------------------------------- the model on its mesh, and the rollouts' source
    model = ShardedModel.of(config)
    score = model.score()
    source = make_source(work, model, tokenizer, protocol, splits, stop)

    # ------------------------------------------------------- the model that the run starts from
    params = first_params(work, model, tokenizer, protocol, stop, clock)
    reference = jax.tree.map(jnp.copy, params) if config.loss.kl_coef else None

    # ---------------------------------------------------------- the state, new or from a checkpoint
    traced, keeps = env_coef.is_traced(config.loss), config.logging.scores > 0
    step, abstract_state, initial_state = model.step(config.optimizer, traced, keeps)
    env_term = EnvTerm(config, num_steps, tokenizer, score, model.balance())
    scores = ScoreStore(work.url('scores', 'train')) if keeps and leads else None
    learner = Learner(config, model, step, env_term, reference, scores)
    heldout = Heldout(source, splits['heldout'], config, num_steps, score)
    checkpointer = Checkpointer(work.url('checkpoints', 'train'), keep=config.checkpoint.keep)
    ahead = groups_ahead(work, splits['train'], source, num_steps)
    metrics = report.open_metrics(work, leads)
    restored = checkpointer.restore(abstract_state)
    if restored is None:
        state, done = initial_state(params), 0
    else:
        state, extra, done = restored
        ahead.set_state(extra['ahead'])
        clock.resume(extra['seconds'])
        env_term.adapted = extra['env_coef']
        heldout.set_state(extra['heldout'])
    metrics.resume(done)
    if leads:
        go_on(work, done, num_steps)
    source.publish(state.params, done)
    before = heldout.draw('before', params, version=0)
    heldout.post(done)  # again, if the run stopped before it was there
    if distributed.leader_says(metrics.lacks(done, 'eval/env_ce')):  # since it was the last step
        metrics.add(done, heldout.env_ce(done, state.params))
    del params

    # ---------------------------------------------------------------------- reinforcement learning
    def save():
        checkpointer.keep_also(heldout.kept_versions)
        if checkpointer.latest() != done:
            if leads:  # first, so that there is no checkpoint without its rows
                remove_old_rollouts(work, done, checkpointer.oldest())
                work.share('metrics.jsonl', LEDGER, 'tensorboard')
            extra = {'ahead': ahead.get_state(), 'heldout': heldout.get_state()}
            extra |= {'env_coef': env_term.adapted, 'seconds': clock.seconds()}
            checkpointer.save(done, state, extra)

    pace = Pace(work, source, num_steps)
    progress = report.Progress('train', num_steps, done)
    with contextlib.closing(checkpointer), progress:
        try:
            while done < num_steps:
                started = time.monotonic()
                rollouts, chosen = ahead.draw(done)
                rollouts, redrawn = redraw_equal(rollouts, source, splits, config, done)
                evaluated = heldout.collect(done)
                drawn = time.monotonic()
                state, values = learner.learn(state, rollouts, done)
                ahead.trained()
                done += 1
                source.publish(state.params, done)
                heldout.post(done)
                learned = time.monotonic()
                values |= chosen | redrawn | evaluated | heldout.env_ce(done, state.params)
                metrics.write(done, values | pace.step(done, rollouts, started, drawn, learned))
                if done % config.checkpoint.every == 0 or heldout.wants_save(done):
                    save()
                progress.show(done, **headline(values))
            save()
        except entry.Stopped:
            save()
            raise

    # ------------------------------------------------------------------------------ what it learned
    summary = before | heldout.draw('after', state.params, version=done)
    summary |= {
        'steps': done,
        'rollouts': done * config.batch.groups * config.group_size,
        'train_minutes': clock.seconds() / 60,
    }
    source.close()
    metrics.close()
    if leads:
        report.results(work, tokenizer, metrics, summary, heldout.rollouts)
    return summary


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    config = ml_collections.FrozenConfigDict(_CONFIG.value)
    distributed.start()
    entry.label_logs(process=jax.process_index())
    check_config(config, entry.overrides())  # before the workdir is this config's for good
    check_reach(_WORKDIR.value)
    for backend in sandboxes_here(config):
        sandbox_maker(config, backend).close()  # fails now if this machine allows no sandbox
    report.CONSOLE.quiet = not distributed.leads()
    idle = ', '.join(inert_keys(config))
    if idle:
        report.CONSOLE.print(f'cannot act with the other keys: {idle}', soft_wrap=True)
    with distributed.leader_first('workdir'):
        work = Workdir(_WORKDIR.value, config, is_learner=True)
    only = work.only_learner() if distributed.leads() else contextlib.nullcontext()
    with only:
        train(config, work)


if __name__ == '__main__':
    entry.run(main, CheckpointError)
