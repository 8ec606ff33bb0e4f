"""The table of rollouts in a real browser, by mouse and by keyboard."""

import urllib.parse

import pytest

from tests.support.browser import wait_until
from tests.support.page import count, rollout, rows, table

pytestmark = pytest.mark.slow


def test_the_table_shows_rollouts_newest_first(visit, address):
    page = table(visit(), address)
    first = rows(page)[0]
    # run, store, task, step, group, sample, reward, status, turns, tokens, stop, surprise
    assert first[:9] == ['first', 'train', 'task-3', '4', '7', '0', '1', 'ok', '2']
    assert rows(page)[2][7] == 'infra_error: the sandbox did not start'
    assert count(page) == '30 of 30 rollouts'
    assert float(first[11]) > 0.5 and rows(page)[8][11] == '–'  # group 5 has no scores


@pytest.mark.parametrize(
    'expression, kept',
    [
        ('reward<0.5 status=truncated', 10),
        ('status=infra_error', 10),
        ('task~SK-3', 12),  # groups 3 and 7, and 3 of the two others
        ('run=second', 3),
        ('step>=4', 6),
        ('step=', 3),  # no training rollouts
        ('sandbox', 10),  # a word, in the reason
        ('task-1', 6),  # a word, in the task
        ('surprise>0', 4),
        ('stop!~max store=train run=first', 16),
        ('reason="the sandbox did not start"', 10),
    ],
)
def test_the_filter_keeps_what_it_says(visit, address, expression, kept):
    page = table(visit(), address)
    page.fill('#filter', expression)
    assert count(page) == f'{kept} of 30 rollouts'
    assert page.get_attribute('.grid', 'aria-rowcount') == str(kept + 1)
    # The address has it, so a link shows the same.
    assert urllib.parse.parse_qs(urllib.parse.urlsplit(page.url).fragment)['q'] == [expression]


@pytest.mark.parametrize(
    'expression, error',
    [
        ('reward<a', 'reward<a: a is no number'),
        ('rewards<1', 'rewards is no column; expected one of run, store'),
        ('task<a', 'task<a: < compares numbers; expected = != ~'),
        ('step~1', 'step~1: ~ compares text'),
        ('task="two words', 'the quote is not closed'),
        ('<5', '<5: expected FIELD<VALUE'),
        ('step>', 'step>: nothing is no number'),
    ],
)
def test_a_bad_filter_is_one_line_and_the_table_stays(visit, address, expression, error):
    page = table(visit(), address)
    page.fill('#filter', expression)
    assert error in page.text_content('#filter-error')
    assert len(rows(page)) > 5
    page.fill('#filter', '')
    assert page.is_hidden('#filter-error')


def test_a_column_sorts_both_ways(visit, address):
    page = table(visit(), address)
    page.click('.grid-head .c-tokens button')
    down = [int(row[9]) for row in rows(page)]
    page.click('.grid-head .c-tokens button')
    up = [int(row[9]) for row in rows(page)]
    assert down == sorted(down, reverse=True) and up == sorted(up) and up[0] < down[0]
    assert page.get_attribute('.grid-head .c-tokens', 'aria-sort') == 'ascending'
    page.click('.grid-head .c-surprise button')
    shown = [row[11] for row in rows(page)]
    assert shown[3] != '–' and shown[4] == '–'  # what has none is last, in either order


def test_groups_have_means_and_open_to_their_rollouts(visit, address):
    page = table(visit(), address)
    page.click('#mode-groups')
    assert page.get_attribute('.grid', 'aria-rowcount') == '11'  # 10 groups and the head
    # Rewards 1, 0 and 0.
    assert rows(page)[0][4:8] == [*('7', '3', '0.333', '1 of 3 ok: the sandbox did not start')]
    page.click('.grid-body [role=row] >> nth=1')
    assert page.input_value('#filter') == 'run="first" store=train group=6'
    assert count(page) == '3 of 30 rollouts'
    page.go_back()
    page.wait_for_selector('#mode-groups[aria-pressed=true]')


def test_the_keyboard_alone_reads_a_rollout(visit, address):
    page = table(visit(), address)
    page.keyboard.press('Tab')
    assert page.evaluate('document.activeElement.id') == 'skip'
    page.keyboard.press('/')
    page.keyboard.type('status=truncated')
    page.keyboard.press('ArrowDown')  # from the filter into the table
    page.keyboard.press('End')
    assert page.evaluate('document.activeElement.getAttribute("role")') == 'grid'
    active = page.evaluate(
        'document.getElementById(document.activeElement.getAttribute("aria-activedescendant"))'
        '.textContent'
    )
    assert active == ''.join(rows(page)[-1])
    page.keyboard.press('Home')
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    page.wait_for_selector('.rollout')
    assert 'r=first/train/6/1' in page.url
    page.keyboard.press('j')  # the next row of the table as it is filtered
    wait_until(page, "document.querySelector('.rollout .facts')?.textContent.includes('group5')")
    assert 'r=first/train/5/1' in page.url
    page.keyboard.press('Escape')
    page.wait_for_selector('.grid:focus')
    page.keyboard.press('?')
    assert 'next largest surprise' in page.text_content('#help[open]')
    page.keyboard.press('Escape')
    page.keyboard.press('2')
    page.wait_for_selector('.curves')


def test_a_rollout_that_comes_late_leaves_the_table_alone(visit, address):
    page = table(visit(), address)
    held = []
    page.route('**/rollout-*.json', lambda route: held.append(route))
    with page.expect_request('**/rollout-*.json'):
        page.click('.grid-body [role=row] >> nth=0')
    page.go_back()
    with page.expect_event('requestfinished', lambda request: '/rollout-' in request.url):
        held[0].continue_()
    page.wait_for_timeout(200)  # for the page to read the answer
    assert page.locator('.rollout').count() == 0
    page.fill('#filter', 'status=truncated')
    assert count(page) == '10 of 30 rollouts'
    page.click('.grid-head .c-tokens button')
    assert page.get_attribute('.grid-head .c-tokens', 'aria-sort') == 'descending'


def test_every_control_is_reached_by_tab_and_can_be_seen_there(visit, address):
    page = rollout(visit(), address)
    reached = []
    for _ in range(24):
        page.keyboard.press('Tab')
        reached.append(
            page.evaluate(
                '(e => [e.id || e.className || e.textContent, e.tagName, '
                'getComputedStyle(e).outlineStyle])(document.activeElement)'
            )
        )
    names = [name for name, *_ in reached]
    for name in ('Overview', 'theme', 'row-after', 'color', 'next-surprise', 'conversation'):
        assert name in names
    # The body, from where the browser itself takes the focus, is no control.
    unseen = [name for name, tag, style in reached if tag != 'BODY' and style == 'none']
    assert unseen == []
