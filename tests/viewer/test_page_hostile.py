"""Text that strangers wrote, in a real browser: it stays text."""

import re
import urllib.parse

import pytest

from echo_jax.store.rollouts import RolloutStore
from tests.support.page import curves, rows, table
from tests.support.viewed_run import conversation, make_run, write_rows
from tests.support.viewer_server import serving

pytestmark = pytest.mark.slow

HOSTILE_TASK = '<img src=x onerror=alert(1)>\u202egpj.exe'


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
