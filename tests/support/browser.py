"""A real browser without a window: Debian's chromium, driven by playwright."""

import contextlib
import shutil
import time
from collections.abc import Iterator

import pytest

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


@contextlib.contextmanager
def browsing() -> Iterator:
    """A playwright Browser. Skips the test if this machine has none."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install playwright')
    if CHROMIUM is None:
        pytest.skip('no chromium here: apt-get install chromium')
    with playwright.sync_playwright() as engine:
        # Root, as in containers, has no sandbox of chromium's; the pages are our own.
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        try:
            yield browser
        finally:
            browser.close()


def wait_until(page, condition: str, seconds: float = 30) -> None:
    """Waits for a condition in JavaScript; a CSP forbids the eval of playwright's own wait."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f'waited {seconds} s in vain for {condition}'
        page.wait_for_timeout(50)


class Visit:
    """One page, with what it asked for and what went wrong in it."""

    def __init__(self, browser, width: int = 1280, theme: str = 'light'):
        self.context = browser.new_context(
            viewport={'width': width, 'height': 800}, color_scheme=theme
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on('request', lambda request: self.requests.append(request.url))
        self.page.on('pageerror', lambda error: self.errors.append(str(error)))
        self.page.on('dialog', lambda dialog: self.errors.append(f'dialog: {dialog.message}'))
        self.page.on('console', self._on_console)

    def _on_console(self, message) -> None:
        # The style of plotly.js's maps, which the page does not let in: see viewer/server.py.
        if message.type == 'error' and 'Applying inline style' not in message.text:
            self.errors.append(message.text)

    def open(self, address: str, state: str = '') -> None:
        self.page.goto(address + (f'#{state}' if state else ''))
        self.page.wait_for_selector('main > *')

    @property
    def overflows(self) -> bool:
        """Whether the page is wider than its window."""
        return self.page.evaluate('document.documentElement.scrollWidth > innerWidth')
