"""One rollout as a document: the numbers of its tokens, its advantage, what is missing and why."""

import numpy as np
import pytest

from echo_jax.learner.unpredictable import token_bytes
from echo_jax.types import Status
from echo_jax.viewer.rollout import rollout_document
from tests.support.random_rollouts import make_rollout, small_config
from tests.support.tokenizers import TINY, build
from tests.support.viewed_run import conversation, scores_of

TABLE = token_bytes(build(TINY))


def document(rollout, group=None, scores=None, store='train', **loss):
    group = group or [rollout]
    step = 1 if store == 'train' else None
    return rollout_document(store, group, rollout, scores, step, small_config(**loss), TABLE)


def expand(runs):
    return [value for value, count in runs for _ in range(count)]


def test_every_number_stands_at_its_token():
    rollout = make_rollout('PPAAROOA')  # tokens 1 to 8, logprobs -0.01 times the token
    shown = document(rollout, scores=scores_of(rollout))
    assert expand(shown['roles']) == [
        *('prompt', 'prompt', 'action', 'action', 'wrapper', 'output', 'output', 'action')
    ]
    assert expand(shown['version_runs']) == [-1, -1, 3, 3, -1, -1, -1, 3]
    measures = shown['measures']
    assert measures['sampler'] == [None, None, -0.03, -0.04, None, None, None, -0.08]
    # scores_of: logprobs -(0.25 + i / 100), CE 0.5 + i / 100, entropy 0.125 + i / 100
    assert measures['ce'][4:7] == pytest.approx([0.54, 0.55, 0.56], abs=1e-3)
    assert measures['ce'][:4] + measures['ce'][7:] == [None] * 5  # no observation
    assert measures['learner'][0] is None and measures['entropy'][0] is None  # nothing predicts it
    assert measures['learner'][1:] == pytest.approx(
        [-0.26, -0.27, -0.28, -0.29, -0.3, -0.31, -0.32], abs=1e-3
    )
    assert measures['entropy'][7] == pytest.approx(0.195, abs=1e-3)
    assert shown['turn_starts'] == [2, 7] and shown['versions'] == [3, 3]


def test_the_text_is_the_conversation():
    rollout = conversation('a\x1b[0m\n', reward=1.0)
    text = ''.join(document(rollout)['text'])
    assert 'Output: a␛[0m\n\n\n(exit_code=0)' in text and text.startswith('<|im_start|>system')


@pytest.mark.parametrize('estimator', ['grpo', 'dr_grpo', 'rloo', 'maxrl'])
def test_the_advantage_is_that_of_the_recipe(estimator):
    rewards = [1.0, 0.0, 0.0]
    group = [make_rollout('PAO', reward=r, sample=i) for i, r in enumerate(rewards)]
    # Mean 1/3; unbiased std sqrt((4/9 + 2/9) / 2) = 0.57735.
    expected = {'grpo': 1.1547, 'dr_grpo': 2 / 3, 'rloo': 1.0, 'maxrl': 2.0}[estimator]
    shown = document(group[0], group, advantages=estimator)
    assert shown['advantage'] == pytest.approx(expected, abs=1e-3)
    assert shown['group_rewards'] == [[0, 1.0, 'ok'], [1, 0.0, 'ok'], [2, 0.0, 'ok']]


def test_an_infra_error_has_no_advantage_and_is_no_part_of_the_others():
    group = [make_rollout('PAO', reward=r, sample=i) for i, r in enumerate([1.0, 0.0, 5.0])]
    group[2].status = Status.INFRA_ERROR
    assert document(group[2], group)['advantage'] is None
    assert 'INFRA_ERROR' in document(group[2], group)['notes'][-1]
    assert document(group[0], group)['advantage'] == pytest.approx(np.sqrt(0.5), abs=1e-3)


def test_what_is_missing_is_said():
    rollout = make_rollout('PAO')
    none = document(rollout)
    assert set(none['measures']) == {'sampler'} and 'none of this rollout' in none['notes'][0]
    other = document(rollout, scores=scores_of(make_rollout('PAOO')))
    assert set(other['measures']) == {'sampler'} and 'of 4 tokens' in other['notes'][0]
    heldout = document(rollout, store='heldout_after')
    assert heldout['advantage'] is None and 'Only training' in heldout['notes'][-1]
    assert heldout['step'] is None and none['step'] == 1
    kl = document(rollout, kl_coef=0.1, kl_in='reward')
    assert kl['advantage'] is None and "kl_in='reward'" in kl['notes'][-1]


def test_numbers_that_json_cannot_say_are_left_out():
    rollout = make_rollout('PAA', reward=float('nan'))
    rollout.rollout_logprobs[1] = -np.inf
    rollout.metrics = {'reward/\x1b': float('inf')}
    shown = document(rollout, store='heldout_after')
    assert shown['reward'] is None and shown['measures']['sampler'] == [None, None, -0.03]
    assert shown['metrics'] == {'reward/␛': None}
    empty = document(make_rollout(''))
    assert empty['text'] == [] and empty['versions'] is None
