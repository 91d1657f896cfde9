"""Steps that the browser tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from playwright.sync_api import Browser, BrowserContext, Error, Locator, Page, sync_playwright
from playwright.sync_api import expect as expect_once

SESSION_COOKIE = "lectern_session"
# Generous: the machine may be busy. Nothing here measures time.
PATIENCE_MS = 30_000


def _patiently(page: Page, act: Callable[[], object]) -> None:
    """Repeat an act while its locator has several matches.

    While a run replaces an element, its predecessor stands beside it for an instant. Playwright
    waits for a match that is missing, but fails at once where there are two.
    """
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while True:
        try:
            act()
            return
        except (AssertionError, Error) as error:
            if "strict mode violation" not in str(error) or time.monotonic() > deadline:
                raise
        page.wait_for_timeout(50)


class _Expectation:
    """The assertions of playwright about `subject`, each tried until it has one match."""

    def __init__(self, subject: Locator | Page, page: Page) -> None:
        self._subject = subject
        self._page = page

    def __getattr__(self, name: str) -> Callable[..., None]:
        def check(*values: Any, **options: Any) -> None:
            expectation = expect_once(cast(Any, self._subject))
            _patiently(self._page, lambda: getattr(expectation, name)(*values, **options))

        return check


def expect(subject: Locator | Page) -> Any:
    """As `playwright.sync_api.expect`, but patient with an element that is being replaced."""
    return _Expectation(subject, subject if isinstance(subject, Page) else subject.page)


def click(target: Locator) -> None:
    """Click when nothing is being replaced or moving: else the click may reach nothing."""
    settled(target.page)
    _still(target.page)
    _patiently(target.page, target.click)


@contextmanager
def chromium(program: str) -> Iterator[Browser]:
    """A headless chromium from the system."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


def new_context(browser: Browser, *, width: int = 1280, height: int = 860) -> BrowserContext:
    context = browser.new_context(viewport={"width": width, "height": height}, locale="en-US")
    context.set_default_timeout(PATIENCE_MS)
    expect_once.set_options(timeout=PATIENCE_MS)
    return context


def sign_in(page: Page, url: str, name: str, password: str) -> None:
    """Sign in on the form and wait for the chat."""
    page.goto(f"{url}/login")
    page.fill("#username", name)
    page.fill("#password", password)
    page.click("button[type=submit]")
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()


def ask(page: Page, question: str) -> None:
    box = page.get_by_test_id("stChatInputTextArea")
    expect(box).to_be_enabled()
    box.fill(question)
    box.press("Enter")


def settled(page: Page) -> None:
    """Wait until the script has run to its end."""
    expect(page.locator("[data-test-script-state=notRunning]")).to_be_attached()


def _still(page: Page) -> None:
    """Wait until nothing moves, at most a second: some animations wait for something themselves."""
    page.evaluate(
        """() => Promise.race([
            Promise.allSettled(document.getAnimations()
                .filter((animation) => animation.effect.getComputedTiming().endTime !== Infinity)
                .map((animation) => animation.finished)),
            new Promise((resolve) => setTimeout(resolve, 1000)),
        ])"""
    )


def go(page: Page, title: str) -> None:
    """Choose a page in the sidebar."""
    click(page.get_by_test_id("stSidebarNav").get_by_role("link", name=title))


def session_token(context: BrowserContext) -> str:
    (cookie,) = [c for c in context.cookies() if c["name"] == SESSION_COOKIE]
    return str(cookie["value"])
