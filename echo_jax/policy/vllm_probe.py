"""The probe that proves a swap: what the learner published with a version, and how it is judged."""

from typing import NamedTuple

import numpy as np

from echo_jax.policy import vllm_rank

# The mean absolute gap of the probe, in nats, that rounding alone can explain.
PROBE_TOLERANCE = {'float32': 1e-3, 'bfloat16': 0.05, 'float16': 0.01}
_SAME = 1e-6  # nats; log-probabilities that differ by less may be those of the same weights
# An engine whose probe changed by a smaller share of what the learner's changed has kept its
# weights. It is not 0, because beside other turns the same weights give slightly other numbers.
_STUCK = 0.1


class _Proven(NamedTuple):
    version: int
    tokens: list[int]
    learner: np.ndarray  # float32 [n - 1], of all tokens but the first
    engine: np.ndarray


class Judge:
    """Says whether an engine has the learner's weights; it remembers the last ones that it had."""

    def __init__(self, tolerance: float):
        self._tolerance = tolerance
        self._proven: _Proven | None = None

    def judge(self, version: int, probe: dict, engine: np.ndarray) -> tuple[float, str]:
        """(the mean absolute gap in nats, what is wrong or '').

        probe: of the version's `about`. engine: float32 [n - 1], the engine's log-probabilities at
        temperature 1 of all its tokens but the first.
        """
        tokens, learner = probe['tokens'], np.asarray(probe['logprobs'], np.float32)[1:]
        gap = float(np.abs(engine - learner).mean())
        if not gap <= self._tolerance:  # a NaN is no success
            return gap, (
                f"the probe's log-probabilities are {gap:.2g} nats off the learner's, more than "
                f'{self._tolerance:g}'
            )
        before = self._proven
        if before is not None and before.tokens == tokens:
            changed = np.abs(before.learner - learner).max()
            if changed > _SAME and np.abs(before.engine - engine).max() < _STUCK * changed:
                return gap, (
                    f"the learner's probe changed since version {before.version}, vLLM's did not"
                )
        self._proven = _Proven(version, tokens, learner, engine)
        return gap, ''


def check_about(about: dict, version: int) -> None:
    """Raises ValueError if what a version says of itself is not enough for a swap."""
    probe = about.get('probe', {})
    tokens, logprobs = probe.get('tokens', ()), probe.get('logprobs', ())
    if not about.get('arrays') or not 1 < len(tokens) == len(logprobs):
        raise ValueError(
            f'version {version} says {sorted(about)} of itself; a swap needs arrays, and a probe '
            f'with as many logprobs ({len(logprobs)}) as tokens ({len(tokens)})'
        )
    vllm_rank.read_published(about['arrays'])  # refuses what a rank would not understand
