"""What tests read on the viewer's page, and its views as they are opened."""

from tests.support.browser import wait_until

REWARD_PLOT = 'document.querySelector(\'figure[aria-label="Curve of rollout/reward"] .plot\')'


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


def rollout(visit, address, key='first/train/7/0', state=''):
    visit.open(address, f'tab=rollouts&r={key}&{state}')
    visit.page.wait_for_selector('.rollout')
    return visit.page


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
