"""Where the learner's rollouts come from: the policy in this process, or workers elsewhere.

Either way the weights go out through the weight store, while the learner goes on, and whole groups
come back through rollout stores; a group that is in its store already is not drawn again, unless it
is damaged. Nothing is trained here.
"""

import asyncio
import concurrent.futures
import functools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol as Interface

import jax
import ml_collections
import numpy as np
import transformers
from flax import nnx

from echo_jax.agent.collect import Assignments, collect
from echo_jax.agent.protocol import Protocol
from echo_jax.learner import batching, distributed
from echo_jax.learner.step import ShardedModel
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.model.attention import BLOCK
from echo_jax.model.family import published_arrays
from echo_jax.policy.jax import JaxPolicy
from echo_jax.run import report
from echo_jax.run.arrivals import Arrivals
from echo_jax.run.entry import Stop
from echo_jax.run.publishing import Publishing
from echo_jax.run.workdir import Workdir
from echo_jax.sandbox.make import sandbox_maker
from echo_jax.store.due import DueGroups
from echo_jax.store.kvstore import MissingError
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.weights import WeightStore
from echo_jax.tasks.drawing import TaskSource
from echo_jax.types import Rollout, Task

PROBE_TOKENS = 256  # at most, on one device


class Source(Interface):
    def publish(self, params: nnx.State, version: int) -> None:
        """Makes `params` the weights that groups due at `version` or later are sampled from.

        Returns before they are written. Raises what went wrong with the version before.
        """

    def post(self, due: DueGroups) -> None:
        """Says that these groups will be waited for; they may be drawn from now on."""

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        """The groups, which were posted, by number. Raises Stopped if a stop is requested."""

    def is_there(self, due: DueGroups) -> bool:
        """Whether `wait` would return at once."""

    def engines(self) -> dict[str, dict[str, float]]:
        """What each engine last said of itself, by its worker's name.

        Without those that are silent for longer than a lease, and in the leading process alone.
        """

    def close(self) -> None:
        """Is called when the run needs no more rollouts."""


def make_source(
    work: Workdir,
    model: ShardedModel,
    tokenizer: transformers.PreTrainedTokenizerFast,
    protocol: Protocol,
    splits: Mapping[str, Sequence[Task]],
    stop: Stop,
) -> Source:
    """The source that `policy.backend` names; `splits` is {'train': tasks, 'heldout': tasks}."""
    if work.config.policy.backend == 'jax':
        return EmbeddedSource(work, model, protocol, splits, stop)
    probe = protocol.prompt_ids(splits['train'][0].instruction)
    return WorkerSource(work, model, tokenizer, probe, stop)


class EmbeddedSource:
    """Samples in this process (`policy.backend='jax'`): when groups are waited for, or with
    `max_staleness` 1 in a thread of its own, in the order in which they were posted.
    """

    def __init__(
        self,
        work: Workdir,
        model: ShardedModel,
        protocol: Protocol,
        splits: Mapping[str, Sequence[Task]],
        stop: Stop,
    ):
        self._config = config = work.config
        self._work, self._model, self._stop = work, model, stop
        self._tasks = {split: {t.task_id: t for t in tasks} for split, tasks in splits.items()}
        self._weights, self._serving = WeightStore(work.url('weights')), model.serving()
        self._policy = JaxPolicy(
            model.model,
            model.graphdef,
            slots=config.policy.slots,
            cache_tokens=config.protocol.max_total_tokens,
        )
        self._ahead = concurrent.futures.ThreadPoolExecutor(1) if config.max_staleness else None
        self._posted: dict[DueGroups, concurrent.futures.Future[None]] = {}
        self._publishing = Publishing()
        self._make_sandbox = sandbox_maker(config)
        self._draw = functools.partial(
            draw_in_waves,
            config=config,
            make_sandbox=self._make_sandbox,
            protocol=protocol,
            policy_for=lambda task: self._policy,
        )

    def publish(self, params: nnx.State, version: int) -> None:
        served = model_params.flatten(self._serving(params))
        self._publishing.begin(functools.partial(self._weights.publish, served, version))

    def post(self, due: DueGroups) -> None:
        if self._ahead:
            self._posted[due] = self._ahead.submit(self._draw_due, due)

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        self._stop.check()
        store = RolloutStore(self._work.url('rollouts', due.store))
        while True:
            if self._ahead:
                self._posted.pop(due).result()
            else:
                self._draw_due(due)
            groups = store.read_sound(due.group_ids)
            if len(groups) == len(due.group_ids):
                return [groups[i] for i in due.group_ids]
            self.post(due)  # again, for those that were damaged

    def is_there(self, due: DueGroups) -> bool:
        return due in self._posted and self._posted[due].done()

    def engines(self) -> dict[str, dict[str, float]]:
        return {'embedded': self._policy.meter.read()}

    def _draw_due(self, due: DueGroups) -> None:
        store = RolloutStore(self._work.url('rollouts', due.store))
        tasks, task_ids = self._tasks[due.split], dict(due.assignments)
        missing = store.missing(task_ids)
        if missing:
            assignments = [(group_id, tasks[task_ids[group_id]]) for group_id in missing]
            self._stop.run(self._draw_missing(assignments, store, due))

    async def _draw_missing(
        self, assignments: list[tuple[int, Task]], store: RolloutStore, due: DueGroups
    ) -> None:
        await asyncio.to_thread(self._publishing.wait)
        version = due.version
        try:
            arrays = self._weights.read(version)
        except MissingError:  # a resumed run may lack the version before that of its state
            version = self._weights.latest()
            if version is None:
                raise
            arrays = self._weights.read(version)
        params = model_params.unflatten(self._model.abstract, arrays)
        await self._policy.load(jax.device_put(params, self._model.placed), version)
        await self._draw(assignments, store, group_size=due.group_size, temperature=due.temperature)

    def close(self) -> None:
        if self._ahead:
            self._ahead.shutdown()
        self._publishing.close()
        self._make_sandbox.close()


class WorkerSource:
    """Leaves the sampling to workers elsewhere (`policy.backend='vllm'`).

    Every host of the learner makes one. Host 0 posts what is due; all hosts publish their shards of
    the weights, and read all groups.
    """

    def __init__(
        self,
        work: Workdir,
        model: ShardedModel,
        tokenizer: transformers.PreTrainedTokenizerFast,
        probe: list[int],
        stop: Stop,
    ):
        """probe: the tokens that every worker scores after it has taken new weights."""
        config = work.config
        self._model = model
        self._weights = WeightStore(
            work.url('weights'), keyframe_every=config.policy.keyframe_every
        )
        self._serving = model.serving()
        self._publishing = Publishing()
        self._published: tuple[nnx.State, int] | None = None  # the newest weights
        self.arrivals = Arrivals(work, stop, self._publish_again, self._publishing.check)
        self._score, self._lease_sec = model.score(), config.policy.lease_sec
        length = probe_length(model)
        self._probe = np.asarray(probe[:length], np.int32)
        self._probe_batch = batching.make_token_batch(
            self._probe[None], config.batch.micro_rows, length
        )
        if distributed.leads():
            self.arrivals.due.clear()
            folder = work.served_model()
            if not folder.exists():
                partial = folder.with_name('model.partial')
                shutil.rmtree(partial, ignore_errors=True)
                huggingface.write_config(partial, model.model, tokenizer, dtype=model.model.dtype)
                partial.rename(folder)
            work.share('model')  # again, in case a killed learner made it and did not share it

    def publish(self, params: nnx.State, version: int) -> None:
        served = self._serving(params)
        scores = self._score(served, self._probe_batch)
        self._published = params, version
        self._publishing.begin(functools.partial(self._write, served, scores, version))

    def _publish_again(self) -> None:
        """Publishes the newest weights once more, because a worker finds them damaged.

        All hosts call it, in a wait for groups: the parameters have not been overwritten yet.
        """
        assert self._published is not None  # a worker has read of it
        params, version = self._published
        self._publishing.wait()
        if distributed.leads():
            self._weights.rewind(version - 1)
        distributed.leader_says(None)  # no host begins before that is done
        self.publish(params, version)

    def _write(self, served: nnx.State, scores: jax.Array, version: int) -> None:
        logprobs = np.asarray(scores)[0, : len(self._probe)]
        about = {
            'arrays': published_arrays(self._model.model),
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
        self.arrivals.post(due)

    def wait(self, due: DueGroups) -> list[list[Rollout]]:
        assert self._published is not None  # or nothing would be due
        return self.arrivals.wait(due, newest=self._published[1])

    def is_there(self, due: DueGroups) -> bool:
        arrived = self.arrivals.look([due], known=(), must_wait=False).arrived
        return len(arrived) == len(due.group_ids)

    def engines(self) -> dict[str, dict[str, float]]:
        since = time.time() - self._lease_sec
        reports = self.arrivals.due.reports(since) if distributed.leads() else []
        return {each['worker']: each for each in reports}

    def close(self) -> None:
        self._publishing.close()
        self.arrivals.close()
        if distributed.leads():
            self.arrivals.due.finish()


def probe_length(model: ShardedModel) -> int:
    """The tokens of the row in which the learner scores the probe.

    A device's share of it is whole blocks of an accelerator's attention kernel, as that of the
    rows of training is.
    """
    least = BLOCK * model.layout.size('tokens')
    return min(max(PROBE_TOKENS, least), model.config.batch.seq_len)


# --------------------------------------------------------------------- which groups, and how many


def read_splits(work: Workdir, protocol: Protocol) -> dict[str, TaskSource]:
    """The tasks whose prompts fit, by split ('train', 'heldout'); says how many there are."""
    limit = work.config.protocol.max_prompt_tokens
    splits = {
        split: TaskSource(work.tasks(split), protocol.count_prompt_tokens, limit)
        for split in ('train', 'heldout')
    }
    dropped = sum(tasks.dropped for tasks in splits.values())
    report.CONSOLE.print(
        f'{len(splits["train"])} training and {len(splits["heldout"])} held-out tasks; '
        f'{dropped} prompts over {limit} tokens dropped'
    )
    return splits


def count_steps(config: ml_collections.ConfigDict, tasks: int) -> int:
    """The steps of a run with that many training tasks, by `num_steps` or by `num_epochs`."""
    if config.num_epochs is None:
        return config.num_steps
    steps = config.num_epochs * (tasks // config.batch.groups)
    if not steps:
        raise ValueError(
            f'{tasks} training tasks are no whole batch of batch.groups={config.batch.groups}, so '
            f'num_epochs={config.num_epochs} has no step; lower batch.groups or set num_steps'
        )
    return steps


def waves(assignments: Assignments, group_size: int, slots: int) -> Iterator[list]:
    """The assignments in lists, so small that every episode of a list has a slot to itself.

    With more episodes than slots, an episode may lose its slot to another, by chance, and is
    prefilled anew: the same tokens, but not the same bits. So a list is collected before the next.
    """
    assignments, size = list(assignments), max(1, slots // group_size)
    return (assignments[i : i + size] for i in range(0, len(assignments), size))


async def draw_in_waves(
    assignments: Assignments,
    store: RolloutStore,
    *,
    config: ml_collections.ConfigDict,
    group_size: int,
    **options,
) -> None:
    """`collect` with the embedded policy, wave after wave; `options` are those of `collect`."""
    for wave in waves(assignments, group_size, config.policy.slots):
        await collect(wave, store, config=config, group_size=group_size, **options)
