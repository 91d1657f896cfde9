"""Steps that the browser tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

SESSION_COOKIE = "lectern_session"
# Generous: the machine may be busy. Nothing here measures time.
PATIENCE_MS = 30_000


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
    expect.set_options(timeout=PATIENCE_MS)
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


def still(page: Page) -> None:
    """Wait until nothing moves: a click on a thing that moves away under it reaches nothing."""
    page.evaluate(
        """() => Promise.allSettled(document.getAnimations()
            .filter((animation) => animation.effect.getComputedTiming().endTime !== Infinity)
            .map((animation) => animation.finished))"""
    )


def go(page: Page, title: str) -> None:
    """Choose a page in the sidebar."""
    page.get_by_test_id("stSidebarNav").get_by_role("link", name=title).click()


def session_token(context: BrowserContext) -> str:
    (cookie,) = [c for c in context.cookies() if c["name"] == SESSION_COOKIE]
    return str(cookie["value"])
