"""How the learner comes by its rollouts: from the policy in this process, or from workers.

Either way weights go out through the weight store and whole groups come back through the rollout
stores; nothing is drawn that is there already. It trains nothing.
"""

import functools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol as Interface

import jax
import numpy as np
from flax import nnx

from echo_jax.agent.collect import Assignments, collect
from echo_jax.agent.protocol import Protocol
from echo_jax.learner import batching, distributed
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.model.family import published_arrays
from echo_jax.policy.jax import JaxPolicy
from echo_jax.run import report
from echo_jax.run.entry import Stop, Stopped
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.due import DueGroups, DueStore
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Task

PROBE_TOKENS = 256
_SILENCE_SECONDS = 60.0  # without a new group, before a person is told


class Source(Interface):
    def publish(self, params: nnx.State, version: int) -> None:
        """Makes `params` what rounds of `version` and later are sampled from."""

    def post(self, due: DueGroups) -> None:
        """Says that a round will be waited for; it may be drawn from now on."""

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        """The groups of a round that was posted, by number. Raises Stopped when asked to stop."""

    def close(self) -> None:
        """After the last round of the run."""


class EmbeddedSource:
    """The policy in this process (`policy.backend = 'jax'`): a round is drawn when waited for."""

    def __init__(
        self,
        work: Workdir,
        sharded: ShardedModel,
        protocol: Protocol,
        tasks: Mapping[str, Sequence[Task]],
        stop: Stop,
    ):
        """tasks: {'train': its tasks, 'heldout': its tasks}."""
        self._config = config = work.config
        self._work, self._sharded, self._stop = work, sharded, stop
        self._tasks = {split: {t.task_id: t for t in tasks[split]} for split in tasks}
        self._weights, self._serving = WeightStore(work.url('weights')), sharded.serving()
        self._policy = JaxPolicy(
            sharded.model,
            sharded.graphdef,
            slots=config.policy.slots,
            cache_tokens=config.protocol.max_total_tokens,
        )
        self._make_sandbox = sandbox_maker(config)
        self._collect = functools.partial(
            collect,
            config=config,
            make_sandbox=self._make_sandbox,
            protocol=protocol,
            policy=self._policy,
        )

    def publish(self, params: nnx.State, version: int) -> None:
        self._weights.publish(model_params.flatten(self._serving(params)), version)

    def post(self, due: DueGroups) -> None:
        pass

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        self._stop.check()
        store = RolloutStore(self._work.url('rollouts', due.store))
        tasks = self._tasks[due.split]
        task_ids = dict(due.assignments)
        if missing := store.missing(task_ids):
            assignments = [(group_id, tasks[task_ids[group_id]]) for group_id in missing]
            self._stop.run(self._draw(assignments, store, due))
        return store.read_groups(due.group_ids)

    async def _draw(self, assignments: list[tuple[int, Task]], store, due: DueGroups) -> None:
        params = model_params.unflatten(self._sharded.abstract, self._weights.read(due.version))
        await self._policy.load(jax.device_put(params, self._sharded.placed), due.version)
        for wave in waves(assignments, due.group_size, self._config.policy.slots):
            await self._collect(wave, store, group_size=due.group_size, temperature=due.temperature)

    def close(self) -> None:
        self._make_sandbox.close()


class WorkerSource:
    """Workers elsewhere (`policy.backend = 'vllm'`); every host of the learner makes one of these.

    Host 0 posts the rounds; all hosts publish their shards of the weights, and read all groups.
    """

    def __init__(
        self, work: Workdir, sharded: ShardedModel, tokenizer, probe: list[int], stop: Stop
    ):
        """probe: the tokens that every worker scores after it has taken new weights."""
        config = work.config
        self._work, self._sharded, self._stop = work, sharded, stop
        self._weights = WeightStore(
            work.url('weights'), keyframe_every=config.policy.keyframe_every
        )
        self._serving = sharded.serving()
        self._due = DueStore(work.url('fleet'))
        self._score = sharded.score()
        length = min(PROBE_TOKENS, config.batch.seq_len)
        self._probe = np.asarray(probe[:length], np.int32)
        self._probe_batch = batching.make_token_batch(
            self._probe[None], config.batch.micro_rows, length
        )
        if distributed.leads():
            self._due.clear()
            if not (folder := work.served_model()).exists():
                partial = folder.with_name('model.partial')
                shutil.rmtree(partial, ignore_errors=True)
                model = sharded.model
                huggingface.write_config(partial, model, tokenizer, dtype=model.dtype)
                partial.rename(folder)
            work.share('model')  # again, where a killed learner had made it and no more

    def publish(self, params: nnx.State, version: int) -> None:
        served = self._serving(params)
        logprobs = np.asarray(self._score(served, self._probe_batch))[0, : len(self._probe)]
        about = {
            'arrays': published_arrays(self._sharded.model),
            'probe': {'tokens': self._probe.tolist(), 'logprobs': logprobs.tolist()},
        }
        self._weights.publish(
            model_params.flatten(served),
            version,
            about=about,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def post(self, due: DueGroups) -> None:
        if distributed.leads():
            self._due.post(due)

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        store = RolloutStore(self._work.url('rollouts', due.store))
        # One host watches and all go on alike: where one stopped alone, the others would hang.
        whole = distributed.leader_says(distributed.leads() and self._arrives(due, store))
        if not whole:
            raise Stopped
        if distributed.leads():
            self._due.withdraw(due)
        return store.read_groups(due.group_ids)

    def _arrives(self, due: DueGroups, store: RolloutStore) -> bool:
        """Waits until every group is there; False where it is asked to stop."""
        missing, last = len(due.group_ids), time.monotonic()
        while not self._stop.requested:
            before, missing = missing, len(store.missing(due.group_ids))
            if not missing:
                return True
            if missing < before:
                last = time.monotonic()
            elif time.monotonic() - last > _SILENCE_SECONDS:
                report.CONSOLE.print(self._silence(due, len(due.group_ids) - missing))
                last = time.monotonic()
            time.sleep(self._work.poll_seconds)
        return False

    def _silence(self, due: DueGroups, there: int) -> str:
        """What a person wants to know when no group comes."""
        now = time.time()
        workers = [
            f'{document["worker"]} with version {document["version"]} draws '
            f'{document["drawing"]} groups, said {now - document["at"]:.0f} s ago'
            for document in self._due.reports()
        ]
        return (
            f'{there} of {len(due.group_ids)} groups of {due.store} at version '
            f'{due.version} are there, none new for {_SILENCE_SECONDS:.0f} s; '
            + (
                'workers: ' + '; '.join(workers)
                if workers
                else 'no worker has reported: start '
                'python -m echo_jax.worker with the same --config and --workdir'
            )
        )

    def close(self) -> None:
        if distributed.leads():
            self._due.finish()


def waves(assignments: Assignments, group_size: int, slots: int) -> Iterator[list]:
    """The assignments in lists whose episodes each have a slot of the embedded policy.

    Beyond that an episode may lose its slot to another, by chance, and is prefilled anew: the same
    tokens, but not the same bits. So each list is collected before the next.
    """
    assignments, size = list(assignments), max(1, slots // group_size)
    return (assignments[i : i + size] for i in range(0, len(assignments), size))


def make_source(work: Workdir, sharded, tokenizer, protocol, tasks: Mapping, stop: Stop) -> Source:
    """By `policy.backend`; `tasks` as in EmbeddedSource."""
    if work.config.policy.backend == 'jax':
        return EmbeddedSource(work, sharded, protocol, tasks, stop)
    probe = protocol.prompt_ids(tasks['train'][0].instruction)
    return WorkerSource(work, sharded, tokenizer, probe, stop)
