"""Two runs, the viewer that serves them, and a real browser; for all tests of the page."""

import pytest

from tests.support.browser import Visit, browsing
from tests.support.viewed_run import make_run, write_group, write_rows
from tests.support.viewer_server import serving

GROUPS = 8  # three rollouts each; the last two are scored


@pytest.fixture(scope='module')  # while it is open, no other test can run an event loop
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture(scope='session')
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


@pytest.fixture(scope='session')
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
