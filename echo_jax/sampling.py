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

from echo_jax import report, worker
from echo_jax.agent.policy.jax import JaxPolicy
from echo_jax.agent.protocol import Protocol
from echo_jax.learner import batching, distributed
from echo_jax.learner.step import Programs
from echo_jax.model import huggingface
from echo_jax.model import params as model_params
from echo_jax.program import Stop, Stopped
from echo_jax.store.rollouts import RolloutStore
from echo_jax.store.rounds import Round, RoundStore
from echo_jax.store.weights import WeightStore
from echo_jax.types import Rollout, Task
from echo_jax.workdir import Workdir

PROBE_TOKENS = 256
_SILENCE_SECONDS = 60.0  # without a new group, before a person is told


class Sampler(Interface):
    def publish(self, params: nnx.State, version: int) -> None:
        """Makes `params` what rounds of `version` and later are sampled from."""

    def post(self, round_: Round) -> None:
        """Says that a round will be waited for; it may be drawn from now on."""

    def wait(self, round_: Round) -> list[list[Rollout]]:
        """The groups of a round that was posted, by number. Raises Stopped when asked to stop."""

    def close(self) -> None:
        """After the last round of the run."""


class Embedded:
    """The policy in this process (`policy.backend = 'jax'`): a round is drawn when waited for."""

    def __init__(
        self,
        work: Workdir,
        programs: Programs,
        protocol: Protocol,
        tasks: Mapping[str, Sequence[Task]],
        stop: Stop,
    ):
        """tasks: {'train': its tasks, 'heldout': its tasks}."""
        self._config = config = work.config
        self._work, self._programs, self._stop = work, programs, stop
        self._tasks = {split: {t.task_id: t for t in tasks[split]} for split in tasks}
        self._weights, self._serving = WeightStore(work.url('weights')), programs.serving()
        self._policy = JaxPolicy(
            programs.model,
            programs.graphdef,
            slots=config.policy.slots,
            cache_tokens=config.protocol.max_total_tokens,
        )
        self._make_sandbox = worker.sandbox_maker(config)
        self._collect = functools.partial(
            worker.collect,
            config=config,
            make_sandbox=self._make_sandbox,
            protocol=protocol,
            policy=self._policy,
        )

    def publish(self, params: nnx.State, version: int) -> None:
        self._weights.publish(model_params.flatten(self._serving(params)), version)

    def post(self, round_: Round) -> None:
        pass

    def wait(self, round_: Round) -> list[list[Rollout]]:
        self._stop.check()
        store = RolloutStore(self._work.url('rollouts', round_.store))
        tasks = self._tasks[round_.split]
        task_ids = dict(round_.assignments)
        if missing := store.missing(task_ids):
            assignments = [(group_id, tasks[task_ids[group_id]]) for group_id in missing]
            self._stop.run(self._draw(assignments, store, round_))
        return store.read_groups(round_.group_ids)

    async def _draw(self, assignments: list[tuple[int, Task]], store, round_: Round) -> None:
        params = model_params.unflatten(self._programs.abstract, self._weights.read(round_.version))
        await self._policy.load(jax.device_put(params, self._programs.placed), round_.version)
        for wave in waves(assignments, round_.group_size, self._config.policy.slots):
            await self._collect(
                wave, store, group_size=round_.group_size, temperature=round_.temperature
            )

    def close(self) -> None:
        self._make_sandbox.close()


class Workers:
    """Workers elsewhere (`policy.backend = 'vllm'`): every host of the learner makes one of these.

    Host 0 posts the rounds; all hosts publish their shards of the weights, and read all groups.
    """

    def __init__(self, work: Workdir, programs: Programs, tokenizer, probe: list[int], stop: Stop):
        """probe: the tokens that every worker scores after it has taken new weights."""
        config = work.config
        self._work, self._programs, self._stop = work, programs, stop
        self._weights = WeightStore(
            work.url('weights'), keyframe_every=config.policy.keyframe_every
        )
        self._serving = programs.serving()
        self._rounds = RoundStore(work.url('fleet'))
        self._score = programs.score()
        length = min(PROBE_TOKENS, config.batch.seq_len)
        self._probe = np.asarray(probe[:length], np.int32)
        self._probe_batch = batching.make_token_batch(
            self._probe[None], config.batch.micro_rows, length
        )
        if distributed.leads():
            self._rounds.clear()
            if not (folder := work.served_model()).exists():
                partial = folder.with_name('model.partial')
                shutil.rmtree(partial, ignore_errors=True)
                model = programs.model
                huggingface.write_config(partial, model, tokenizer, dtype=model.dtype)
                partial.rename(folder)
            work.share('model')  # again, where a killed learner had made it and no more

    def publish(self, params: nnx.State, version: int) -> None:
        served = self._serving(params)
        logprobs = np.asarray(self._score(served, self._probe_batch))[0, : len(self._probe)]
        about = {
            'tensors': huggingface.tensor_names(model_params.flatten(params)),
            'probe': {'tokens': self._probe.tolist(), 'logprobs': logprobs.tolist()},
        }
        self._weights.publish(
            model_params.flatten(served),
            version,
            about=about,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def post(self, round_: Round) -> None:
        if distributed.leads():
            self._rounds.post(round_)

    def wait(self, round_: Round) -> list[list[Rollout]]:
        store = RolloutStore(self._work.url('rollouts', round_.store))
        # One host watches and all go on alike: where one stopped alone, the others would hang.
        whole = distributed.leader_says(distributed.leads() and self._arrives(round_, store))
        if not whole:
            raise Stopped
        if distributed.leads():
            self._rounds.withdraw(round_)
        return store.read_groups(round_.group_ids)

    def _arrives(self, round_: Round, store: RolloutStore) -> bool:
        """Waits until every group is there; False where it is asked to stop."""
        missing, last = len(round_.group_ids), time.monotonic()
        while not self._stop.requested:
            before, missing = missing, len(store.missing(round_.group_ids))
            if not missing:
                return True
            if missing < before:
                last = time.monotonic()
            elif time.monotonic() - last > _SILENCE_SECONDS:
                report.CONSOLE.print(self._silence(round_, len(round_.group_ids) - missing))
                last = time.monotonic()
            time.sleep(self._work.poll_seconds)
        return False

    def _silence(self, round_: Round, there: int) -> str:
        """What a person wants to know when no group comes."""
        now = time.time()
        workers = [
            f'{document["worker"]} with version {document["version"]} draws '
            f'{document["drawing"]} groups, said {now - document["at"]:.0f} s ago'
            for document in self._rounds.reports()
        ]
        return (
            f'{there} of {len(round_.group_ids)} groups of {round_.store} at version '
            f'{round_.version} are there, none new for {_SILENCE_SECONDS:.0f} s; '
            + (
                'workers: ' + '; '.join(workers)
                if workers
                else 'no worker has reported: start '
                'python -m echo_jax.worker with the same --config and --workdir'
            )
        )

    def close(self) -> None:
        if distributed.leads():
            self._rounds.finish()


def waves(assignments: worker.Assignments, group_size: int, slots: int) -> Iterator[list]:
    """The assignments in lists whose episodes each have a slot of the embedded policy.

    Beyond that an episode may lose its slot to another, by chance, and is prefilled anew: the same
    tokens, but not the same bits. So each list is collected before the next.
    """
    assignments, size = list(assignments), max(1, slots // group_size)
    return (assignments[i : i + size] for i in range(0, len(assignments), size))


def make_sampler(
    work: Workdir, programs, tokenizer, protocol, tasks: Mapping, stop: Stop
) -> Sampler:
    """By `policy.backend`; `tasks` as in Embedded."""
    if work.config.policy.backend == 'jax':
        return Embedded(work, programs, protocol, tasks, stop)
    probe = protocol.prompt_ids(tasks['train'][0].instruction)
    return Workers(work, programs, tokenizer, probe, stop)
