"""pass@k and environment cross-entropy of a run's policy, or a check of tasks without a model.

    python -m echo_jax.evaluate --config=configs/tiny.py --workdir=runs/tiny \
        --agent=policy --samples=4 --output=eval.json

`--agent=policy` samples with the newest weights that the run has published. `oracle` runs each
task's solution/solve.sh, which must earn the reward; `nop` does nothing, which must not. All
results are written, and which tasks were left out and why. The exit code is 1 if a result is an
INFRA_ERROR, which says nothing about the agent.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from echo_jax.agent.protocol import Protocol
from echo_jax.learner.step import make_score
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.policy.jax import JaxPolicy
from echo_jax.run import entry, tasksets
from echo_jax.run.inert import check_inert
from echo_jax.run.measures import env_ce, imagined, pass_rates
from echo_jax.run.oracle import run_agent, show_failures
from echo_jax.run.report import CONSOLE, Progress
from echo_jax.run.sources import draw_in_waves
from echo_jax.run.workdir import Workdir, unpacked, write_whole
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import SOLVED_REWARD, Rollout, Status, Task

_CONFIG = config_flags.DEFINE_config_file('config', help_string='Recipe: FILE[:variant].')
_WORKDIR = flags.DEFINE_string('workdir', '', 'Run whose newest weights are evaluated.')
_TASKS = flags.DEFINE_string(
    'tasks', '', "Directory or .parquet of tasks, or several with commas; else a run's held-out."
)
_AGENT = flags.DEFINE_enum('agent', 'policy', ['policy', 'oracle', 'nop'], 'Who acts.')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'Rollouts of every task.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file to write.')
flags.mark_flag_as_required('config')


def evaluate_policy(
    stop: entry.Stop,
    config: ml_collections.ConfigDict,
    work: Workdir,
    tasks: Sequence[Task],
    samples: int,
) -> tuple[list[dict], dict]:
    """(results, env_ce and imagined) of eval.json, by the newest weights."""
    weights = WeightStore(work.url('weights'))
    version = weights.latest()
    if version is None:
        raise ValueError(
            f'{work.url()} has published no weights yet; run echo_jax.train on it first'
        )
    model_config = huggingface.recipe_config(config.model)
    graphdef, abstract = model_params.abstract(model_config)
    params = model_params.unflatten(abstract, weights.read(version))
    policy = JaxPolicy(
        model_config,
        graphdef,
        slots=config.policy.slots,
        cache_tokens=config.protocol.max_total_tokens,
    )
    store = RolloutStore('memory://')
    rewards: list[float] = []

    def on_group(group: list[Rollout]) -> None:
        rewards.extend(r.reward for r in group)
        bar.show(len(rewards), reward=float(np.mean(rewards)))

    async def draw():
        await policy.load(params, version)
        await draw_in_waves(
            enumerate(tasks),
            store,
            config=config,
            make_sandbox=make_sandbox,
            protocol=Protocol(work.tokenizer(), config.protocol),
            policy_for=lambda task: policy,
            group_size=samples,
            temperature=config.eval.temperature,
            on_group=on_group,
        )

    total = len(tasks) * samples
    with Progress('policy', total) as bar, sandbox_maker(config) as make_sandbox:
        stop.run(draw())
    rollouts = [r for group in store.read_groups(range(len(tasks))) for r in group]
    score = jax.jit(make_score(graphdef, config.batch.micro_rows))
    results = [
        _result(r.task_id, r.sample_id, r.reward, r.status, r.reason, len(r.turn_starts))
        for r in rollouts
    ]
    ce = env_ce(score, params, rollouts, config)
    return results, {'env_ce': ce, 'imagined': imagined(rollouts)}


def _result(
    task_id: str, sample_id: int, reward: float, status: Status, reason: str, turns: int
) -> dict:
    return {
        'task_id': task_id,
        'sample_id': sample_id,
        'reward': reward,
        'correct': bool(reward >= SOLVED_REWARD),
        'status': str(status),
        'reason': reason,  # of an infra_error or a verifier_error
        'turns': turns,
    }


def _open_run() -> Workdir | None:
    """The run that --workdir names, if any. Raises ValueError if it holds no run."""
    if not _WORKDIR.value:
        return None
    if not Workdir.holds_run(_WORKDIR.value):
        raise ValueError(f'{_WORKDIR.value} holds no run; name the --workdir of echo_jax.train')
    return Workdir(_WORKDIR.value, _CONFIG.value)


def _read_tasks(work: Workdir | None, cache: pathlib.Path) -> tasksets.Read:
    if _TASKS.value:
        return tasksets.read(_TASKS.value, _CONFIG.value, cache)
    if work is None:
        raise ValueError(
            f'--agent={_AGENT.value} needs --tasks, a directory or .parquet of Harbor tasks, or '
            'the --workdir of a run for its held-out ones'
        )
    return work.read_tasks('heldout')


def main(argv: Sequence[str]) -> None:
    del argv
    config, agent, samples = _CONFIG.value, _AGENT.value, _SAMPLES.value
    check_inert(config, entry.overrides())
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)  # an error now, not after all the work
    work = _open_run()
    with unpacked(work) as cache:
        if agent == 'policy' and work is None:
            raise ValueError('--agent=policy needs --workdir, the run whose weights are evaluated')
        tasks, left_out = _read_tasks(work, cache)
        stop, measured = entry.Stop(), {'env_ce': {}, 'imagined': None}
        try:
            if work is not None and agent == 'policy':
                results, measured = evaluate_policy(stop, config, work, tasks, samples)
            else:
                outcomes = run_agent(stop, tasks, config, agent, samples)
                results = [_result(*outcome[:5], turns=0) for outcome in outcomes]
        except entry.Stopped:
            sys.exit('stopped')
    rates = pass_rates(results, samples)
    document = {
        'results': results,
        'left_out': [one._asdict() for one in left_out],
        'pass@k': rates,
        **measured,
    }
    if _OUTPUT.value:
        write_whole(output, json.dumps(document, indent=1))
    shown = ', '.join(f'pass@{k} {rate:.1%}' for k, rate in rates.items())
    bad = sum(result['status'] not in (Status.OK, Status.TRUNCATED) for result in results)
    show_failures({result['task_id']: result['reason'] for result in results if result['reason']})
    without = f' ({len(left_out)} more left out)' if left_out else ''
    CONSOLE.print(f'{len(tasks)} tasks{without}, {agent}: {shown}; {bad} with an error status')
    lost = sum(result['status'] == Status.INFRA_ERROR for result in results)
    if lost:
        sys.exit(f'error: {lost} of {len(results)} results are an infra_error; see their reasons')


if __name__ == '__main__':
    entry.run(main)
