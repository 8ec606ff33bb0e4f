"""The page as a whole in a real browser: overview, widths, themes, live and from files."""

import re

import numpy as np
import pytest

from echo_jax.viewer.site import Site
from echo_jax.viewer.static import export
from tests.support.browser import wait_until
from tests.support.page import REWARD_PLOT, count, curves, data, rollout, rows, table
from tests.support.viewed_run import make_run, write_group, write_rows, write_scores
from tests.support.viewer_server import serving

pytestmark = pytest.mark.slow


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


def test_a_card_is_drawn_again_only_if_it_says_something_else(visit, tmp_path):
    work = make_run(tmp_path / 'run')
    write_rows(work, 1, 2)
    write_group(work, 0)
    write_group(work, 1)
    file = work.path / 'rollouts' / 'train' / 'groups' / f'{0:012d}'
    file.write_bytes(file.read_bytes()[:-9])
    with serving([work.url()]) as address:
        view = visit()
        view.open(address)
        page = view.page
        wait_until(page, "document.querySelector('.card').textContent.includes('3 rollouts')")
        page.click('summary >> text=1 that cannot be read')
        page.evaluate("document.querySelector('.card').dataset.seen = 'yes'")
        before = page.text_content('.ago')
        for _ in range(4):  # at the fourth request three polls are over
            with page.expect_request('**/run-0/glance.json'):
                pass
        focused = page.evaluate_handle('document.activeElement')
        assert focused.text_content() == '1 that cannot be read'
        assert focused.evaluate("e => e.matches('.card[data-seen] details[open] > summary')")
        wait_until(page, f"document.querySelector('.ago').textContent !== '{before}'")
        assert page.locator('.card[data-seen]').count() == 1  # the time went on, and no more
        write_rows(work, 3, 3)
        wait_until(page, "document.querySelector('.card').textContent.includes('step 3 of 10')")
        assert page.locator('.card[data-seen]').count() == 0


def test_a_server_that_has_ended_is_said(visit, tmp_path):
    work = make_run(tmp_path / 'run')
    view = visit()
    with serving([work.url()]) as address:
        view.open(address)
    view.page.wait_for_selector('#trouble:not([hidden])')
    assert 'is python -m echo_jax.view still running?' in view.page.text_content('#trouble')
    view.errors.clear()  # the browser itself writes down what did not answer


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
