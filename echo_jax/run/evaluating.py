"""Evaluates a model, or an agent without one: draws the results that are not there yet. No JAX."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from echo_jax.agent.protocol import Protocol
from echo_jax.run import entry
from echo_jax.run.evaluated import Opened, Place
from echo_jax.run.measures import env_ce, imagined
from echo_jax.run.oracle import run_agent
from echo_jax.run.report import Progress
from echo_jax.run.results import Results, make_result, result_of
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout, Status, Task


async def evaluate_policy(
    config: ml_collections.ConfigDict,
    place: Place,
    backend: str,
    tasks: Sequence[Task],
    samples: int,
    kept: Results,
    fixed: str = '',
) -> dict[str, Any]:
    """Draws what `kept` lacks, and returns what eval.json says of the model beside its rates.

    config: the recipe with the model of `place` in it.
    backend: what samples and scores, 'jax' or 'vllm'.
    samples: of each task; 0 draws nothing.
    fixed: rollouts that are scored too, as `read_rollouts` finds them; '' for none.
    """
    others = read_rollouts(fixed, len(place.tokenizer())) if fixed else []
    if backend == 'vllm':  # an environment has either JAX or vLLM
        from echo_jax.run.evaluated_vllm import open_model
    else:
        from echo_jax.run.evaluated_jax import open_model
    async with open_model(place, config) as model:
        measured: dict[str, Any] = {'version': place.version, 'imagined': None}
        if samples:
            drawn = await _draw(config, place, model, tasks, samples, kept)
            measured['imagined'] = imagined(drawn)
            measured['env_ce'] = await asyncio.to_thread(env_ce, model.score, drawn, config)
        if others:
            ce = await asyncio.to_thread(env_ce, model.score, others, config)
            measured['env_ce_fixed'] = {'rollouts': fixed, **ce}
    return measured


async def _draw(
    config: ml_collections.ConfigDict,
    place: Place,
    model: Opened,
    tasks: Sequence[Task],
    samples: int,
    kept: Results,
) -> list[Rollout]:
    """The rollouts of every task, those that are there and those that are drawn now."""
    store, ids = kept.rollouts, range(len(tasks))
    there = [i for i in store.groups() if i in ids]
    groups = dict(zip(there, store.read_groups(there)))
    failed = [i for i in there if any(r.status == Status.INFRA_ERROR for r in groups[i])]
    store.remove(failed)
    old = [r for i in there if i not in failed for r in groups[i]]
    rewards = [r.reward for r in old]
    kept.replace(map(result_of, old))

    def on_group(group: list[Rollout]) -> None:
        for rollout in group:
            kept.add(result_of(rollout))
            rewards.append(rollout.reward)
        bar.show(len(rewards), reward=float(np.mean(rewards)))

    total = len(tasks) * samples
    with Progress('policy', total, len(rewards)) as bar, sandbox_maker(config) as make_sandbox:
        await model.collect(
            enumerate(tasks),
            store,
            config=config,
            make_sandbox=make_sandbox,
            protocol=Protocol(place.tokenizer(), config.protocol),
            policy_for=lambda task: model.policy,
            group_size=samples,
            temperature=config.eval.temperature,
            on_group=on_group,
        )
    rollouts = [r for group in store.read_groups(ids) for r in group]
    kept.replace(map(result_of, rollouts))  # in the order of the tasks
    return rollouts


def evaluate_agent(
    stop: entry.Stop,
    config: ml_collections.ConfigDict,
    agent: str,
    tasks: Sequence[Task],
    samples: int,
    kept: Results,
) -> None:
    """Runs 'oracle' or 'nop' on what `kept` lacks."""
    kept.replace(r for r in kept.found if r['status'] != Status.INFRA_ERROR)
    run_agent(
        stop,
        tasks,
        config,
        agent,
        samples,
        done={(r['task_id'], r['sample_id']) for r in kept.found},
        on_outcome=lambda outcome: kept.add(make_result(*outcome[:5], turns=0)),
    )
    order = {task.task_id: number for number, task in enumerate(tasks)}
    kept.replace(sorted(kept.found, key=lambda r: (order[r['task_id']], r['sample_id'])))


def read_rollouts(place: str, vocabulary: int) -> list[Rollout]:
    """The rollouts of a store: RUN/NAME, which stands for RUN/rollouts/NAME, or a store's folder.

    Raises ValueError if there are none, or if they are of a tokenizer of more tokens than
    `vocabulary`.
    """
    run, name = os.path.split(place.rstrip('/'))  # pathlib would take a slash out of gs://
    for url in (place, os.path.join(run, 'rollouts', name)):
        store = RolloutStore(url)
        rollouts = [r for group in store.read_groups(store.groups()) for r in group]
        if rollouts:
            break
    else:
        raise ValueError(
            f'--rollouts={place} holds no rollouts, or they were removed by logging.rollouts; name '
            'RUN/heldout_before, or a rollout store'
        )
    largest = max(int(r.tokens.max(initial=0)) for r in rollouts)
    if largest >= vocabulary:
        raise ValueError(
            f'--rollouts={place} has token {largest}, and the tokenizer of the model {vocabulary} '
            'tokens; name rollouts of the same tokenizer'
        )
    return rollouts
