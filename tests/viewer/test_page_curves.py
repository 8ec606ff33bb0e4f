"""Two rollouts side by side, and curves, in a real browser."""

import pytest

from tests.support.browser import wait_until
from tests.support.page import REWARD_PLOT, curves, data, rollout
from tests.support.viewed_run import make_run, write_rows
from tests.support.viewer_server import serving

pytestmark = pytest.mark.slow


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


def test_the_focus_stays_where_it_is_when_the_metrics_are_listed_anew(visit, address):
    page = curves(visit(), address)
    page.fill('#metric-search', 'rollout/reward')  # the whole name of a metric
    assert page.locator('.names input').count() == 1
    assert page.evaluate('document.activeElement.id') == 'metric-search'
    page.focus('.names input')
    page.keyboard.press('Space')
    assert not page.is_checked('.names input')
    assert page.evaluate('document.activeElement.value') == 'rollout/reward'
    assert page.evaluate('document.activeElement.type') == 'checkbox'


def test_why_there_is_no_curve(visit, tmp_path):
    work = make_run(tmp_path / 'run')
    with serving([work.url()]) as address:
        view = visit()
        view.open(address, 'tab=curves')
        page = view.page
        page.wait_for_selector('.plots p')
        assert page.text_content('.plots') == 'No row of metrics is there yet.'
        assert page.text_content('.names') == ''
        page.fill('#metric-search', 'nothing')
        assert page.text_content('.names') == ''
        write_rows(work, 1, 1)
        wait_until(page, "document.querySelector('.names').textContent !== ''")
        assert page.text_content('.names') == 'No metric has this in its name.'
        page.fill('#metric-search', '')
        while page.locator('.names :checked').count():
            page.click('.names :checked >> nth=0')
        assert page.text_content('.plots') == 'No metric is chosen.'
