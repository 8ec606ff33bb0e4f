"""How fast a run goes, and who waits for whom: the metrics of its steps that the clock decides."""

import collections
import shutil
import time
from collections.abc import Sequence

import numpy as np

from echo_jax.run.sources import Source
from echo_jax.run.standing import RECENT
from echo_jax.run.workdir import Workdir
from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Rollout


class Pace:
    """Times the steps from row to row, so that saves and evaluations count in the step after."""

    def __init__(self, work: Workdir, source: Source, num_steps: int):
        self._path, self._source, self._num_steps = work.path, source, num_steps
        self._rollouts = RolloutStore(work.url('rollouts', 'train'))
        self._last = time.monotonic()
        self._steps: collections.deque[float] = collections.deque(maxlen=RECENT)

    def step(
        self, done: int, rollouts: Sequence[Rollout], started: float, drawn: float, learned: float
    ) -> dict[str, float]:
        """Metrics `time/...` and `system/...` of the step after which `done` are done.

        By time.monotonic(), it `started` to wait for its `rollouts`, had them `drawn`, and had
        `learned` and published. The next step's time begins now.
        """
        self._last, before = time.monotonic(), self._last
        self._steps.append(self._last - before)
        tokens = sum(len(rollout.tokens) for rollout in rollouts)
        return {
            'time/sampling': drawn - started,
            'time/learning': learned - drawn,
            'time/step': self._steps[-1],
            'time/left': float(np.mean(self._steps)) * (self._num_steps - done),
            'system/learner_idle': (drawn - started) / self._steps[-1],
            'system/learned_tokens_per_sec': tokens / (learned - drawn),
            'system/disk_free_bytes': float(shutil.disk_usage(self._path).free),
            'system/damaged_groups': float(len(self._rollouts.set_aside())),
            **self._engines(),
        }

    def _engines(self) -> dict[str, float]:
        engines = self._source.engines()
        values = {
            'system/engines': float(len(engines)),
            'system/sampled_tokens_per_sec': sum(
                each['tokens_per_sec'] for each in engines.values()
            ),
        }
        for name, each in engines.items():
            values[f'system/engine_idle/{name}'] = each['idle_now']
            values[f'system/engine_swapping/{name}'] = each['swapping_now']
        return values
