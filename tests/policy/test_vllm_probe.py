"""How the probe of a swap is judged; it needs no vLLM."""

import numpy as np
import pytest

from echo_jax.policy.vllm_probe import Judge, check_about

TOKENS = [3, 1, 4, 1]


def probe(*logprobs):
    return {'tokens': TOKENS, 'logprobs': [0.0, *logprobs]}


def engine(*logprobs):
    return np.array(logprobs, np.float32)


def test_the_gap_is_the_mean_over_tokens():
    """(0.1 + 0.1 + 0.4) / 3 = 0.2."""
    for tolerance, refused in ((0.19, True), (0.21, False)):
        gap, problem = Judge(tolerance).judge(1, probe(-1, -2, -3), engine(-1.1, -1.9, -3.4))
        assert gap == pytest.approx(0.2, abs=1e-6)
        assert bool(problem) == refused and refused == ('more than 0.19' in problem)
    assert Judge(np.inf).judge(1, probe(-1, -2, -3), engine(-1, np.nan, -3))[1]


@pytest.mark.parametrize('noise', [0.0, 1e-6])
def test_weights_that_stay_are_refused_beside_other_turns_too(noise):
    """Beside other turns the same weights give numbers that differ by rounding."""
    judge = Judge(1e-3)
    assert judge.judge(1, probe(-1, -2, -3), engine(-1, -2, -3))[1] == ''
    # The learner's changed by 1e-4, the engine's by nothing or by noise.
    changed = probe(-1.0001, -2.0001, -3)
    problem = judge.judge(2, changed, engine(-1 + noise, -2, -3 - noise))[1]
    assert problem == "the learner's probe changed since version 1, vLLM's did not"
    assert judge.judge(2, changed, engine(-1.0001 + noise, -2.0001, -3))[1] == ''
    # The same weights again, as after a step without a gradient.
    assert judge.judge(3, changed, engine(-1.0001, -2.0001 + noise, -3))[1] == ''


def test_what_a_swap_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"version 4 says \['probe'\] of itself; a swap needs"):
        check_about({'probe': probe(-1, -2, -3)}, 4)
