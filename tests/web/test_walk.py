"""The whole product, in a browser and through the official client: the walk of every role."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import openai
import psutil
import pytest
from playwright.sync_api import Browser, Page

from tests.programs import needs
from tests.web.browsing import ask, chromium, click, expect, go, new_context, session_token
from tests.web.serving_pages import free_port

ROOT = Path(__file__).parents[2]
# A first start makes the demo model and indexes the sample course, on whatever machine this is.
START_SECONDS = 240
ANSWER_MS = 120_000
# The line below all notes of the welcome page.
WELCOMED = "For a start"


@dataclass
class Product:
    """A running `lectern up`."""

    page_url: str
    api_url: str
    home: Path
    process: subprocess.Popen[str]
    passwords: dict[str, str]


def _first_passwords(home: Path) -> dict[str, str]:
    """User name to password, from the file that the first start writes."""
    file = home / "initial-login"
    assert file.stat().st_mode & 0o777 == 0o600
    words = [line.split() for line in file.read_text().splitlines()]
    return {
        name: line[index + 1]
        for line in words
        for index, name in enumerate(line[:-1])
        if name in {"admin", "teacher", "student"}
    }


def _wait_until_ready(process: subprocess.Popen[str], seconds: float) -> list[str]:
    """Read the output until it says that the product is ready; later output is thrown away."""
    assert process.stdout is not None
    output = process.stdout
    lines: Queue[str | None] = Queue()

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    seen: list[str] = []
    while True:
        line = lines.get(timeout=seconds)
        assert line is not None, "lectern up ended:\n" + "".join(seen)
        seen.append(line)
        if "Lectern is ready" in line:
            return seen


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    needs("chromium")
    home = tmp_path_factory.mktemp("lectern-home")
    web, backend, engine = free_port(), free_port(), free_port()
    command = [sys.executable, "-m", "deploy.cli", "up", "--home", str(home)]
    command += ["--web-port", str(web), "--backend-port", str(backend)]
    command += ["--engine-port", str(engine)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "HOME": str(home.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _wait_until_ready(process, START_SECONDS)
        yield Product(
            f"http://127.0.0.1:{web}",
            f"http://127.0.0.1:{backend}/v1",
            home,
            process,
            _first_passwords(home),
        )
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == [], "lectern up left processes behind"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(needs("chromium")) as started:
        yield started


def _enter(page: Page, product: Product, name: str) -> None:
    """Sign in for the first time or again, changing a one-time password when asked to."""
    page.goto(product.page_url)
    page.fill("#username", name)
    page.fill("#password", product.passwords[name])
    page.click("button[type=submit]")
    page.wait_for_url(lambda url: "/login" not in url)
    if "/password" in page.url:
        own = f"the own words of {name}"
        page.fill("#current", product.passwords[name])
        page.fill("#new", own)
        page.fill("#again", own)
        page.click("button[type=submit]")
        product.passwords[name] = own
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()


def test_the_first_password_of_the_administrator_is_changed_and_its_file_goes(
    product: Product, browser: Browser
) -> None:
    assert (product.home / "initial-login").exists()
    context = new_context(browser)
    page = context.new_page()
    before = product.passwords["admin"]
    _enter(page, product, "admin")
    assert product.passwords["admin"] != before
    assert not (product.home / "initial-login").exists()
    context.close()


def test_a_student_asks_in_both_languages_and_opens_a_passage(
    product: Product, browser: Browser
) -> None:
    context = new_context(browser)
    context.set_default_timeout(ANSWER_MS)
    page = context.new_page()
    _enter(page, product, "student")
    expect(page.get_by_text("The demo weights are untrained")).to_be_visible()
    expect(page.get_by_text("Compiler Construction").first).to_be_visible()

    expect(page.get_by_text(WELCOMED)).to_be_visible()
    indexing = page.get_by_text("documents are being indexed")
    deadline = time.monotonic() + START_SECONDS
    while indexing.count():
        assert time.monotonic() < deadline, "the sample course was not indexed"
        page.wait_for_timeout(2000)
        page.reload()
        expect(page.get_by_text(WELCOMED)).to_be_visible()

    ask(page, "为什么左递归的文法不能直接用递归下降的方法分析？")
    found = page.get_by_text(re.compile(r"\d+ passages? found"))
    expect(found).to_be_visible(timeout=ANSWER_MS)
    stop = page.get_by_role("button", name="Stop answering")
    expect(stop).to_be_visible()
    stop.click()
    expect(stop).to_have_count(0, timeout=ANSWER_MS)

    ask(page, "What happens when two rules of a scanner match the same text?")
    expect(stop).to_be_visible(timeout=ANSWER_MS)
    expect(stop).to_have_count(0, timeout=ANSWER_MS)
    expect(page.get_by_text("The answer broke off")).to_have_count(0)
    expect(found).to_have_count(2)
    click(found.last)
    click(page.locator("[class*=st-key-found-] button[kind=tertiary]:visible").last)
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("mark")).to_be_in_viewport()
    assert len(str(dialog.locator("mark").text_content()).strip()) > 20
    page.keyboard.press("Escape")

    page.reload()
    expect(page.get_by_test_id("stChatMessage")).to_have_count(4)
    expect(page.get_by_test_id("stChatMessage").first).to_contain_text("左递归")
    token = session_token(context)
    assert token not in page.content()
    for log in (product.home / "logs").rglob("*"):
        assert not log.is_file() or token not in log.read_text(errors="replace")
    context.close()


def test_a_key_made_on_the_page_serves_the_official_client(
    product: Product, browser: Browser
) -> None:
    context = new_context(browser)
    page = context.new_page()
    _enter(page, product, "student")
    go(page, "Keys and usage")
    expect(page.get_by_text(product.api_url, exact=True)).to_be_visible()
    page.get_by_label("Name of the key").fill("editor")
    click(page.get_by_role("button", name="Create key"))
    shown = page.locator(".st-key-new-key code")
    expect(shown).to_have_text(re.compile("^sk-"))
    client = openai.OpenAI(base_url=product.api_url, api_key=str(shown.text_content()), timeout=120)
    models = [model.id for model in client.models.list()]
    assert models
    stream = client.chat.completions.create(
        model=models[0],
        messages=[{"role": "user", "content": "What is a token?"}],
        max_tokens=16,
        stream=True,
    )
    reasons = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert reasons[-1] in {"stop", "length"}
    assert len(reasons) > 1

    click(page.get_by_role("button", name="I have stored it"))
    page.reload()
    expect(page.get_by_text("editor").first).to_be_visible()
    click(page.get_by_role("button", name="Revoke").first)
    expect(page.get_by_text("revoked").first).to_be_visible()
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    client.close()
    context.close()


def test_a_teacher_uploads_a_document_and_finds_it(
    product: Product, browser: Browser, tmp_path: Path
) -> None:
    context = new_context(browser)
    page = context.new_page()
    _enter(page, product, "teacher")
    go(page, "Course documents")
    expect(page.locator("[class*=st-key-document-]").first).to_be_visible()
    good = tmp_path / "quokka-scheduling.md"
    good.write_text(
        "# Quokka scheduling\n\n## Choosing the next quokka\n\n"
        "A quokka scheduler picks the marsupial whose lunch is due first.\n"
    )
    bad = tmp_path / "not-really.pdf"
    bad.write_text("this is no PDF")
    page.locator("input[type=file]").set_input_files([str(good), str(bad)])
    expect(page.get_by_test_id("stFileChip")).to_have_count(2)
    click(page.get_by_role("button", name="Add to the course"))
    rows = page.locator("[class*=st-key-document-]")
    expect(rows.filter(has_text=good.name).last).to_contain_text("ready", timeout=ANSWER_MS)
    # What is no PDF is refused at once or fails with a sentence; the other file is not held up.
    expect(page.get_by_test_id("stAlert").filter(has_text=re.compile("PDF")).first).to_be_visible(
        timeout=ANSWER_MS
    )
    go(page, "Search")
    page.get_by_role("searchbox").fill("which marsupial does the quokka scheduler pick")
    page.get_by_role("searchbox").press("Enter")
    first = page.locator("[class*=st-key-result-]").first
    expect(first).to_contain_text("whose lunch is due first")
    click(first.get_by_role("button", name="Open in the document"))
    expect(page.get_by_role("dialog").locator("mark")).to_contain_text("lunch is due first")
    context.close()


def test_the_administrator_sees_live_figures(product: Product, browser: Browser) -> None:
    context = new_context(browser)
    page = context.new_page()
    _enter(page, product, "admin")
    go(page, "Monitoring")
    expect(page.get_by_text("engine is up")).to_be_visible()
    ttft = page.get_by_test_id("stMetric").filter(has_text="TTFT p50")
    expect(ttft).to_be_visible()
    expect(page.get_by_text(re.compile(r"in use · .* cached · .* free"))).to_be_visible()
    stages = page.locator("[data-testid=stVegaLiteChart]")
    expect(stages.first).to_be_visible()
    context.close()
