"""The page in a real browser: each view, by mouse and by keyboard, live and from files."""

import re
import urllib.parse

import numpy as np
import pytest

from echo_jax.store.rollouts import RolloutStore
from echo_jax.types import Role
from echo_jax.viewer.site import Site
from echo_jax.viewer.static import export
from tests.support.browser import Visit, browsing, wait_until
from tests.support.viewed_run import conversation, make_run, write_group, write_rows, write_scores
from tests.support.viewer_server import serving

pytestmark = pytest.mark.slow

GROUPS = 8  # three rollouts each; the last two are scored
REWARD_PLOT = 'document.querySelector(\'figure[aria-label="Curve of rollout/reward"] .plot\')'
HOSTILE_TASK = '<img src=x onerror=alert(1)>\u202egpj.exe'


@pytest.fixture(scope='module')
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two runs: `first` with 24 + 3 rollouts and 8 steps, `second` with 3 and 4."""
    folder = tmp_path_factory.mktemp('viewed')
    first, second = make_run(folder / 'first'), make_run(folder / 'second')
    for group_id in range(GROUPS):
        write_group(first, group_id, scored=group_id >= GROUPS - 2)
    write_group(first, 3, store='heldout_after')
    write_group(second, 3)
    write_rows(first, 1, 8)
    write_rows(second, 1, 4)
    return first, second


@pytest.fixture(scope='module')
def address(runs):
    with serving([work.url() for work in runs]) as address:
        yield address


@pytest.fixture
def visit(browser):
    """Calling it makes a Visit; whatever goes wrong in it fails the test."""
    visits = []

    def make(**options):
        visits.append(Visit(browser, **options))
        return visits[-1]

    yield make
    errors = [error for each in visits for error in each.errors]
    for each in visits:
        each.context.close()
    assert errors == []


def rows(page) -> list[list[str]]:
    """The text of the table's rows that are drawn, in their order on the screen."""
    return page.eval_on_selector_all(
        '.grid-body [role=row]',
        'rows => rows.map(row => [...row.children].map(cell => cell.textContent))',
    )


def count(page) -> str:
    return page.text_content('.tools output')


def table(visit, address, state='', total=30):
    """The table of both runs, once all of it is read."""
    visit.open(address, f'tab=rollouts&{state}')
    wait_until(visit.page, f"document.body.textContent.includes('of {total} rollouts')")
    return visit.page


# ---------------------------------------------------------------------------------------- table


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


# ------------------------------------------------------------------------------------- one rollout


def rollout(visit, address, key='first/train/7/0', state=''):
    visit.open(address, f'tab=rollouts&r={key}&{state}')
    visit.page.wait_for_selector('.rollout')
    return visit.page


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


# ----------------------------------------------------------------------------- compare and curves


def test_two_rollouts_of_a_task_side_by_side(visit, address):
    view = visit()
    view.open(address, 'tab=compare&task=task-3')
    page = view.page
    page.wait_for_selector('.panes')
    assert page.locator('.pane').count() == 2
    options = page.eval_on_selector_all('#pick-a option', 'all => all.map(o => o.value)')
    assert len(options) == 12  # groups 3 and 7 of the first run, one of the second, one held out
    page.select_option('#pick-a', 'first/train/7/0')
    wait_until(page, "document.querySelector('.pane').textContent.includes('notes-7.txt')")
    page.select_option('#pick-b', 'second/train/3/0')
    wait_until(page, "document.querySelectorAll('.pane')[1].textContent.includes('notes-3.txt')")
    assert 'a=first/train/7/0' in page.url and 'b=second/train/3/0' in page.url
    page.select_option('#color', 'advantage')
    assert page.locator('.pane .a2').count() > 10
    page.fill('#task', 'task-2')
    page.keyboard.press('Enter')
    wait_until(page, "document.querySelectorAll('#pick-a option').length === 6")


def test_a_rollout_leads_to_its_comparison(visit, address):
    page = rollout(visit(), address, key='first/train/7/1')
    page.click('.stick >> text=compare')
    page.wait_for_selector('.panes')
    assert (
        page.input_value('#pick-a') == 'first/train/7/1' and page.input_value('#task') == 'task-3'
    )


def curves(visit, address, state=''):
    visit.open(address, f'tab=curves&{state}')
    visit.page.wait_for_selector('.plots[data-drawn=yes]')
    return visit.page


def data(page, metric):
    """What plotly.js has drawn: [{name, x, y, mode}, ...]."""
    return page.evaluate(
        '(label => document.querySelector(`figure[aria-label="${label}"] .plot`).data.map('
        '({name, x, y, mode, fill}) => ({name, x, y, mode, fill})))',
        f'Curve of {metric}',
    )


def test_curves_of_both_runs_lie_over_each_other(visit, address):
    page = curves(visit(), address)
    drawn = data(page, 'rollout/reward')
    assert [trace['name'] for trace in drawn] == ['first', 'second']
    assert drawn[0]['x'] == [*range(1, 9)] and drawn[0]['y'] == [step / 10 for step in range(1, 9)]
    assert len(drawn[1]['x']) == 4
    assert page.locator('figure path.js-line').count() >= 6
    page.click('#run-choice button >> nth=1')
    page.wait_for_selector('.plots[data-drawn=yes]')
    wait_until(page, f'{REWARD_PLOT}.data?.length === 1')


def test_an_interval_is_a_band_and_evaluations_are_points(visit, address):
    page = curves(visit(), address)
    low, high, mean, *_ = data(page, 'eval/solve_rate')
    assert low['y'] == [0.4] * 4 and high['fill'] == 'tonexty' and mean['mode'] == 'lines+markers'
    names = page.eval_on_selector_all('.names input', 'all => all.map(box => box.value)')
    assert 'eval/solve_rate' in names and 'eval/solve_rate/low' not in names


def test_smoothing_log_scale_and_search(visit, address):
    page = curves(visit(), address)
    page.focus('#smooth')
    page.keyboard.press('ArrowRight')
    wait_until(page, f'{REWARD_PLOT}.data?.length === 4')
    faint, smooth = data(page, 'rollout/reward')[:2]
    assert faint['y'][:3] == [0.1, 0.2, 0.3] and smooth['y'][:3] == pytest.approx([0.1, 0.15, 0.25])
    assert '2 steps' in page.text_content('.curves output') and 'smooth=2' in page.url
    page.check('#log')
    wait_until(page, "document.querySelector('figure .plot').layout.yaxis.type === 'log'")
    page.fill('#metric-search', 'SAMPLING')
    assert page.locator('.names input').count() == 1
    page.check('.names input')
    # Its line is level, and so has no height to be seen by.
    sampling = 'figure[aria-label="Curve of time/sampling"] path.js-line'
    page.wait_for_selector(sampling, state='attached')
    page.reload()
    page.wait_for_selector(sampling, state='attached')
    assert page.is_checked('#log') and page.input_value('#metric-search') == 'SAMPLING'
    assert page.locator('figure').count() == 5  # and the four of the default set that are there


# -------------------------------------------------------------------------------- the whole page


def test_the_overview_says_how_each_run_is(visit, address):
    view = visit()
    view.open(address)
    cards = view.page.locator('.card')
    assert cards.count() == 2
    first = cards.nth(0).text_content()
    for part in ('step 8 of 10', '8 s left', 'sampling 75%', 'infra_error 16', '27 rollouts'):
        assert part in first
    assert '9 × infra_error: the sandbox did not start' in first


@pytest.mark.parametrize('tab', ['overview', 'curves', 'rollouts', 'compare'])
@pytest.mark.parametrize('width', [1280, 800, 400])
def test_no_view_is_wider_than_its_window(visit, address, tab, width):
    view = visit(width=width)
    view.open(address, f'tab={tab}')
    view.page.wait_for_selector('.plots[data-drawn=yes]' if tab == 'curves' else 'main > *')
    assert not view.overflows
    view.open(address, 'tab=rollouts&r=first/train/7/0')
    view.page.wait_for_selector('.rollout')
    assert not view.overflows


def test_the_theme_is_the_systems_until_it_is_chosen(visit, address):
    background = 'getComputedStyle(document.body).backgroundColor'
    light, dark = visit(theme='light'), visit(theme='dark')
    light.open(address)
    dark.open(address)
    white, black = light.page.evaluate(background), dark.page.evaluate(background)
    assert white == 'rgb(255, 255, 255)' and black != white
    for _ in range(2):
        light.page.click('#theme')
    assert light.page.evaluate(background) == black and 'theme=dark' in light.page.url
    light.page.keyboard.press('t')
    assert light.page.evaluate(background) == white and 'theme' not in light.page.url


def contrast(page, selector):
    """WCAG's contrast of an element's colour with the page behind it."""
    colours = page.eval_on_selector(
        selector,
        'e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]',
    )

    def luminance(colour):
        parts = np.array(re.findall(r'[\d.]+', colour)[:3], float) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_text_can_be_read_in_both_themes(visit, address, theme):
    page = rollout(visit(theme=theme), address)
    for selector in (
        '.r-action',
        '.r-output',
        '.r-wrapper',
        '.r-scaffold',
        '.r-prompt',
        'dt',
        'h2',
    ):
        assert contrast(page, selector) >= 4.5, selector


def test_only_the_server_is_asked(visit, address):
    view = visit()
    for tab in ('overview', 'curves', 'rollouts', 'compare'):
        view.open(address, f'tab={tab}')
        if tab == 'curves':
            view.page.wait_for_selector('.plots[data-drawn=yes]')
    assert len(view.requests) > 15
    assert [url for url in view.requests if not url.startswith((address, 'data:', 'blob:'))] == []


def test_the_page_follows_a_run_that_goes_on(visit, tmp_path):
    work = make_run(tmp_path / 'run')
    with serving([work.url()]) as address:
        view = visit()
        view.open(address)
        assert 'no step yet' in view.page.text_content('.card')
        write_rows(work, 1, 2)
        wait_until(view.page, "document.body.textContent.includes('step 2 of 10')")
        group = write_group(work, 0)
        page = table(view, address, total=3)
        write_group(work, 1)
        wait_until(page, "document.body.textContent.includes('6 of 6 rollouts')")
        assert rows(page)[0][3] == '1'  # group 1, now the first row
        write_scores(work, group)
        wait_until(
            page,
            "[...document.querySelectorAll('.c-surprise')].some(c => /^0|^1/.test(c.textContent))",
        )
        page = curves(view, address)
        write_rows(work, 3, 3)
        wait_until(page, f'{REWARD_PLOT}.data?.[0].x.length === 3')


def test_a_server_that_has_ended_is_said(visit, tmp_path):
    work = make_run(tmp_path / 'run')
    view = visit()
    with serving([work.url()]) as address:
        view.open(address)
    view.page.wait_for_selector('#trouble:not([hidden])')
    assert 'is python -m echo_jax.view still running?' in view.page.text_content('#trouble')
    view.errors.clear()  # the browser itself writes down what did not answer


# ------------------------------------------------------------------------------------ the export


def test_the_export_is_the_same_page_without_a_server(visit, runs, tmp_path):
    site = Site([work.url() for work in runs])
    for run in site.runs:
        run.index.look()
    export(site, tmp_path / 'page', lambda count: None)
    view, address = visit(), (tmp_path / 'page' / 'index.html').as_uri()
    page = table(view, address)
    page.fill('#filter', 'status=truncated')
    assert count(page) == '10 of 30 rollouts'
    page.click('.grid-body [role=row] >> nth=0')
    page.wait_for_selector('.rollout')
    assert 'ls: nothing' in page.text_content('.conversation')
    page.keyboard.press('n')
    assert 'environment CE' in page.text_content('.tip')
    page.keyboard.press('2')
    page.wait_for_selector('.plots[data-drawn=yes]')
    assert [trace['name'] for trace in data(page, 'rollout/reward')] == ['first', 'second']
    page.keyboard.press('4')
    page.wait_for_selector('.panes')
    page.keyboard.press('1')
    page.wait_for_selector('.card')
    assert {url.partition(':')[0] for url in view.requests} <= {'file', 'data', 'blob'}


# ---------------------------------------------------------------------------------- hostile text


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    work = make_run(tmp_path_factory.mktemp('hostile') / 'run<b>')
    group = [
        conversation(
            '<script>alert(1)</script><img src=x onerror=alert(2)> javascript:alert(3)\n',
            '\x1b[2J\x1b]8;;http://evil.example\x07link\x1b]8;;\x07 \x00\x08 \u202egpj.exe\u200b\n',
            b'\xff\xfe broken \xf0\x9f',
            b'x' * 1_000_000,
            reward=1.0,
        )
    ]
    group[0].task_id = HOSTILE_TASK
    group[0].reason = '<svg onload=alert(4)>\u2066'
    group[0].tests_output = '</pre><script>alert(5)</script>\x1b[31m'
    group[0].metrics['reward/<a href="http://evil.example">x</a>'] = 1.0
    RolloutStore(work.url('rollouts', 'train')).write_group(group)
    write_rows(work, 1, 3, **{'rollout/reward/<a href="http://evil.example">k</a>': 1.0})
    with serving([work.url()]) as address:
        yield address


def made_of_text(page) -> int:
    """How many elements there are that only a stranger's text could have made."""
    return page.locator('main :is(script, img, svg[onload], iframe, a, b, style)').count()


def test_hostile_text_is_text(visit, hostile):
    view = visit()
    page = table(view, hostile, total=1)
    shown = rows(page)[0]
    assert shown[1] == '<img src=x onerror=alert(1)><U+202E>gpj.exe'
    assert '<svg onload=alert(4)><U+2066>' in shown[6] and made_of_text(page) == 0
    page.click('.grid-body [role=row]')
    page.wait_for_selector('.rollout')
    text = page.text_content('.conversation')
    assert '<script>alert(1)</script><img src=x onerror=alert(2)> javascript:alert(3)' in text
    assert '␛[2J␛]8;;http://evil.example␇link␛]8;;␇ ␀␈ <U+202E>gpj.exe<U+200B>' in text
    assert '\ufffd\ufffd broken \ufffd' in text
    assert '</pre><script>alert(5)</script>␛[31m' in page.text_content('aside')
    assert 'reward/<a href="http://evil.example">x</a>' in page.text_content('aside')
    assert made_of_text(page) == 0 and not view.overflows
    assert [url for url in view.requests if not url.startswith((hostile, 'data:'))] == []


def test_a_line_of_a_megabyte_leaves_the_page_usable(visit, hostile):
    view = visit()
    page = table(view, hostile, total=1)
    page.click('.grid-body [role=row]')
    page.wait_for_selector('.more')
    assert page.locator('.conversation span').count() < 5000
    assert re.fullmatch(r'show 998,\d{3} more characters', page.text_content('.more'))
    page.click('.more')
    assert re.fullmatch(r'show 978,\d{3} more characters', page.text_content('.more'))
    assert not view.overflows
    page.select_option('#color', 'logprob')
    page.hover('.block.agent .t >> nth=2')
    assert 'log-probability' in page.text_content('.tip')
    page.keyboard.press('Escape')
    page.keyboard.press('Escape')
    page.wait_for_selector('.grid')


def test_hostile_names_of_metrics_and_runs_are_text_in_plots(visit, hostile):
    view = visit()
    name = 'rollout/reward/<a href="http://evil.example">k</a>'
    page = curves(view, hostile, 'm=' + urllib.parse.quote(urllib.parse.quote(name)))
    page.wait_for_selector('figure path.js-line', state='attached')
    assert page.text_content('figure h3') == name
    page.hover('.plot .nsewdrag')
    page.wait_for_selector('.hoverlayer text')
    assert 'run<b>' in page.text_content('.hoverlayer')  # bold, it would have been the end of it
    assert made_of_text(page) == 0
