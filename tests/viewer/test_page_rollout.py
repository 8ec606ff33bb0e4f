"""One rollout in a real browser: the conversation, colours and numbers of its tokens."""

import re

import numpy as np
import pytest

from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Role
from tests.support.page import rollout

pytestmark = pytest.mark.slow


def test_a_rollout_is_the_conversation_it_was(visit, address):
    page = rollout(visit(), address)
    text = page.text_content('.conversation')
    assert 'Solve the task in bash.' in text and 'Output: notes-7.txt' in text
    assert page.text_content('.block.terminal .r-output') in 'notes-7.txt'
    assert page.locator('.block').count() == 4  # the prompt, a turn, its output, the last turn
    assert '1 passed in group 7' in page.text_content('aside')
    facts = page.text_content('.rollout .facts')
    assert 'reward1' in facts and 'policy version7' in facts and 'advantage0.707' in facts


def test_tokens_are_coloured_by_what_is_chosen(visit, address):
    page = rollout(visit(), address)
    colour = 'getComputedStyle(document.querySelector(".t.%s")).backgroundColor'
    page.select_option('#color', 'ce')
    # Token i has 0.5 + i / 100 nats: the output stands behind token 50 and before token 150.
    assert page.locator('.block.terminal .h4').count() > 3
    assert page.locator('.block.agent .none').count() > 3  # the agent's tokens have no CE
    levels = [page.evaluate(colour % level) for level in ('h3', 'h4')]
    assert len({*levels}) >= 1 and 'rgba(0, 0, 0, 0)' not in levels[1]
    page.select_option('#color', 'advantage')
    assert page.locator('.block.agent .t:not(.a2)').count() == 0  # 0.707
    page.select_option('#color', 'logprob')
    assert page.locator('.conversation .h3').count() > 3
    assert 'color=logprob' in page.url
    page.reload()
    page.wait_for_selector('.conversation .h3')


def test_the_numbers_of_a_token_on_hover(visit, address, runs):
    page = rollout(visit(), address)
    [group] = RolloutStore(runs[0].url('rollouts', 'train')).read_groups([7])
    token = int(np.flatnonzero(group[0].roles == Role.OUTPUT)[0])
    page.hover('.block.terminal .r-output >> nth=0')
    tip = page.text_content('.tip')
    assert f'token{token} of {len(group[0].tokens)}' in tip and 'roleoutput' in tip
    assert f'id{group[0].tokens[token]}' in tip
    ce = float(re.search(r'environment CE([\d.]+) nats', tip)[1])
    assert ce == pytest.approx(0.5 + token / 100, abs=6e-3)
    page.hover('h2')
    assert page.is_hidden('.tip')


def test_arrows_move_a_cursor_with_the_same_numbers(visit, address):
    page = rollout(visit(), address)
    page.focus('.conversation')
    for _ in range(3):
        page.keyboard.press('ArrowRight')
    assert 'token2 of' in page.text_content('.tip') and page.locator('.cursor').count() == 1
    page.keyboard.press('ArrowDown')  # the first token of the first turn
    assert 'roleaction' in page.text_content('.tip') and 'policy version7' in page.text_content(
        '.tip'
    )
    assert 'role action' in page.text_content('#said')  # and a screen reader says it
    page.keyboard.press('ArrowLeft')
    assert 'roleprompt' in page.text_content('.tip')
    page.keyboard.press('Escape')
    assert page.is_hidden('.tip') and page.is_visible('.rollout')


def test_the_largest_surprise_is_one_key_away(visit, address, runs):
    page = rollout(visit(), address, key='first/train/7/1')
    [group] = RolloutStore(runs[0].url('rollouts', 'train')).read_groups([7])
    observed = np.flatnonzero(group[1].roles >= Role.WARNING)
    page.keyboard.press('n')  # the CE grows with the place, so the last one is the largest
    assert f'token{observed[-1]} of' in page.text_content('.tip')
    page.click('#next-surprise')
    assert f'token{observed[-2]} of' in page.text_content('.tip')
    assert f'2 of {len(observed)}' in page.text_content('.stick output')


def test_without_scores_the_rest_is_there_and_it_is_said(visit, address):
    page = rollout(visit(), address, key='first/train/0/0')
    assert 'none of this rollout' in page.text_content('aside')
    assert page.is_disabled('#next-surprise')
    disabled = page.eval_on_selector_all('#color option:disabled', 'all => all.map(o => o.value)')
    assert disabled == ['entropy', 'ce']
    page.select_option('#color', 'logprob')
    assert page.locator('.block.agent .t:not(.none)').count() > 3
    assert page.locator('.block.terminal .t:not(.none)').count() == 0


def test_a_rollout_that_is_not_there_is_said(visit, address):
    view = visit()
    view.open(address, 'tab=rollouts&r=first/train/99/0')
    view.page.wait_for_selector('main [role=alert]')
    assert 'no such document' in view.page.text_content('main')
    view.errors.clear()  # the browser itself writes down the 404
