"""The pages in a real browser, before a backend in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page

from tests.programs import needs
from tests.web.browsing import (
    ask,
    chromium,
    click,
    expect,
    go,
    new_context,
    session_token,
    settled,
    sign_in,
)
from tests.web.fake_backend import FakeBackend
from tests.web.serving_pages import running_backend, running_pages


@dataclass
class Stage:
    """What the tests of this file share: the pages, what is behind them, a browser."""

    url: str
    backend: FakeBackend
    browser: Browser
    log: Path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    program = needs("chromium")
    log = tmp_path_factory.mktemp("web") / "web.log"
    backend = FakeBackend(delay=0.005)
    with (
        running_backend(backend) as backend_url,
        running_pages(backend_url, log) as url,
        chromium(program) as browser,
    ):
        yield Stage(url, backend, browser, log)


@pytest.fixture
def context(stage: Stage) -> Iterator[BrowserContext]:
    made = new_context(stage.browser)
    yield made
    made.close()


@pytest.fixture
def student(stage: Stage, context: BrowserContext) -> Page:
    page = context.new_page()
    sign_in(page, stage.url, "student", "student-password")
    return page


def _begun(page: Page) -> Locator:
    return page.get_by_text("A scanner takes the").and_(page.locator("p:has(strong)"))


def _answer(page: Page, text: str = "The cost is") -> Locator:
    return page.get_by_test_id("stChatMessage").filter(has_text=text).last


def test_the_cookie_is_hidden_from_scripts_and_the_token_from_the_page(
    stage: Stage, context: BrowserContext
) -> None:
    page = context.new_page()
    addresses: list[str] = []
    frames: list[bytes | str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on(
        "websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(frame))
    )
    sign_in(page, stage.url, "student", "student-password")
    (cookie,) = [c for c in context.cookies() if c["name"] == "lectern_session"]
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Lax", "/")
    assert cookie["secure"] is False  # plain HTTP; the form tests cover HTTPS
    token = str(cookie["value"])
    settled(page)
    assert frames
    assert "lectern_session" not in page.evaluate("document.cookie")
    assert token not in page.content()
    assert token not in page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    assert not any(token in address for address in addresses)
    assert not any(
        token.encode() in (frame if isinstance(frame, bytes) else frame.encode())
        for frame in frames
    )
    assert token not in stage.log.read_text()
    foreign = [a for a in addresses if not a.startswith((stage.url, "data:", "blob:"))]
    assert foreign == []


def test_reload_keeps_the_login_and_finds_the_conversation(student: Page) -> None:
    ask(student, "What is maximal munch?")
    expect(_answer(student)).to_be_visible()
    expect(student).to_have_url(re.compile(r"conversation=\d+"))
    student.reload()
    expect(_answer(student)).to_be_visible()
    expect(student.get_by_test_id("stChatMessage").first).to_contain_text("What is maximal munch?")
    click(student.get_by_role("button", name="New conversation"))
    expect(student.get_by_text("What would you like to know?")).to_be_visible()
    click(student.get_by_role("button", name="What is maximal munch?").first)
    expect(_answer(student)).to_be_visible()


def test_an_answer_shows_its_passages_and_a_citation_opens_its_place(
    stage: Stage, student: Page
) -> None:
    foreign: list[str] = []
    student.on(
        "request",
        lambda r: (
            foreign.append(r.url) if not r.url.startswith((stage.url, "data:", "blob:")) else None
        ),
    )
    ask(student, "long slow question about the longest match")
    expect(student.get_by_text("4 passages found")).to_be_visible()
    expect(student.get_by_role("button", name="Stop answering")).to_be_visible()
    answer = _answer(student)
    expect(answer).to_be_visible()
    expect(student.get_by_role("button", name="Stop answering")).to_have_count(0)
    expect(answer).to_contain_text("some passages were left out (1)")
    assert answer.locator("img").count() == 0
    assert student.locator("script", has_text="alert(1)").count() == 0
    expect(answer).to_contain_text("the notes (notes.example)")
    expect(answer.locator(".katex")).to_have_count(1)
    expect(answer.locator("pre")).to_have_count(1)
    assert foreign == []

    click(answer.locator('a[href*="#cite-"]').first)
    dialog = student.get_by_role("dialog")
    expect(dialog).to_contain_text("[1] Lexical analysis")
    expect(dialog).to_contain_text("Lexical analysis › Longest match")
    marked = dialog.locator("mark")
    expect(marked).to_contain_text("takes the longest lexeme")
    expect(marked).not_to_contain_text("turns characters into tokens")
    expect(dialog.locator(".frame")).to_contain_text("turns characters into tokens")
    click(dialog.get_by_text("Show the whole document"))
    expect(dialog.locator(".frame")).to_contain_text("A character that starts no token")
    expect(marked).to_be_in_viewport()
    assert "#" not in student.url
    student.keyboard.press("Escape")
    expect(dialog).to_have_count(0)

    click(answer.get_by_role("button", name="2 Lexical analysis › Errors").first)
    expect(student.get_by_role("dialog")).to_contain_text("[2]")


def test_stop_keeps_what_was_written(stage: Stage, student: Page) -> None:
    ask(student, "slow: tell me everything")
    expect(_begun(student)).to_be_visible()
    student.get_by_role("button", name="Stop answering").click()
    expect(student.get_by_text("Stopped. What was written so far is kept.")).to_be_visible()
    stored = stage.backend.conversations[-1]["messages"][-1]
    assert stored["state"] == "stopped"
    assert 0 < len(stored["content"]) < 200
    student.reload()
    expect(student.get_by_text("Stopped. What was written so far is kept.")).to_be_visible()
    expect(_begun(student)).to_be_visible()
    ask(student, "and once more")
    expect(_answer(student)).to_be_visible()


def test_a_reload_attaches_to_the_running_answer(stage: Stage, student: Page) -> None:
    ask(student, "slow: and do not stop")
    expect(_begun(student)).to_be_visible()
    student.reload()
    expect(student.get_by_role("button", name="Stop answering")).to_be_visible()
    expect(_begun(student)).to_be_visible()
    expect(_answer(student)).to_be_visible()
    expect(student.get_by_role("button", name="Stop answering")).to_have_count(0)
    assert stage.backend.conversations[-1]["messages"][-1]["state"] == "complete"


def test_failures_are_sentences(student: Page) -> None:
    ask(student, "please refuse this")
    expect(student.get_by_text("The question is too long.")).to_be_visible()
    expect(student.get_by_text("please refuse this").last).to_be_visible()
    ask(student, "please break off")
    expect(student.get_by_text("The engine stopped; the answer so far is kept.")).to_be_visible()
    expect(_begun(student)).to_be_visible()
    student.goto(student.url.split("?")[0] + "?conversation=99999")
    expect(student.get_by_text("What would you like to know?")).to_be_visible()


def test_conversations_are_renamed_and_deleted(student: Page) -> None:
    ask(student, "A question to rename")
    expect(_answer(student)).to_be_visible()
    settled(student)
    click(student.locator(".st-key-conversation-menu button").first)
    student.get_by_label("Title").fill("*A new* name")
    student.get_by_label("Title").press("Enter")
    click(student.locator(".st-key-rename button"))
    expect(student.get_by_role("heading", name="*A new* name")).to_be_visible()
    settled(student)
    click(student.locator(".st-key-delete button"))  # the menu is still open
    expect(student.get_by_text("What would you like to know?")).to_be_visible()
    expect(student.get_by_role("button", name="*A new* name")).to_have_count(0)


def test_logout_in_one_tab_ends_the_other(
    stage: Stage, context: BrowserContext, student: Page
) -> None:
    other = context.new_page()
    other.goto(stage.url)
    expect(other.get_by_test_id("stChatInputTextArea")).to_be_visible()
    token = session_token(context)
    click(student.get_by_role("button", name="Sign out"))
    expect(student.locator("#username")).to_be_visible()
    assert token not in stage.backend.sessions
    # Nobody touches the other tab: it notices by itself.
    expect(other.locator("#username")).to_be_visible()
    assert not any(c["name"] == "lectern_session" for c in context.cookies())


def test_two_people_in_one_browser_never_mix(stage: Stage, context: BrowserContext) -> None:
    first = context.new_page()
    sign_in(first, stage.url, "student", "student-password")
    ask(first, "a secret question of the first person")
    expect(_answer(first)).to_be_visible()
    address = first.url
    second = context.new_page()
    sign_in(second, stage.url, "other", "other-password")
    expect(second.get_by_text("Other Student")).to_be_visible()
    assert second.get_by_text("a secret question").count() == 0
    # The first tab holds a session that has ended: it shows the other person or the form,
    # and nothing of the first person, whatever is done there.
    expect(first.get_by_text("a secret question")).to_have_count(0)
    # The tab moves on by itself; going elsewhere before it has arrived would be cut short.
    form = first.get_by_role("button", name="Sign in")
    expect(form.or_(first.get_by_text("Other Student"))).to_be_visible()
    first.goto(address)
    expect(first.get_by_text("Other Student")).to_be_visible()
    assert first.get_by_text("a secret question").count() == 0
    assert first.get_by_text("林同学").count() == 0


def test_a_dropped_connection_does_not_come_back_as_another_person(
    stage: Stage, context: BrowserContext, student: Page
) -> None:
    ask(student, "before the connection drops")
    expect(_answer(student)).to_be_visible()
    context.set_offline(True)
    person = next(p for p in stage.backend.people if p.username == "other")
    token = stage.backend.login_out(person)["token"]
    (cookie,) = [c for c in context.cookies() if c["name"] == "lectern_session"]
    context.add_cookies(
        [{"name": "lectern_session", "value": token, "url": stage.url, "httpOnly": True}]
    )
    assert cookie["value"] != token
    context.set_offline(False)
    student.reload()
    expect(student.get_by_text("Other Student")).to_be_visible()
    assert student.get_by_text("before the connection drops").count() == 0


def test_two_people_in_two_browsers_see_their_own(stage: Stage) -> None:
    contexts = [new_context(stage.browser) for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    names = ["student", "other"]
    for page, name in zip(pages, names, strict=True):
        sign_in(page, stage.url, name, f"{name}-password")
    for page, name in zip(pages, names, strict=True):
        ask(page, f"slow: asked by {name}")
    for page, name in zip(pages, names, strict=True):
        expect(page.get_by_test_id("stChatMessage").first).to_contain_text(f"asked by {name}")
        expect(_answer(page)).to_be_visible()
    for page, stranger in zip(pages, reversed(names), strict=True):
        assert page.get_by_text(f"asked by {stranger}").count() == 0
    for context in contexts:
        context.close()


def test_a_key_is_shown_once(stage: Stage, student: Page) -> None:
    go(student, "Keys and usage")
    student.get_by_label("Name of the key").fill("my laptop")
    click(student.get_by_role("button", name="Create key"))
    shown = student.locator(".st-key-new-key code")
    expect(shown).to_have_text(re.compile(r"^sk-\w{30,}$"))
    key = str(shown.text_content())
    assert key == stage.backend.keys[-1]["key"]
    expect(student.get_by_text(re.compile("api_key="))).to_be_visible()
    click(student.get_by_role("button", name="I have stored it"))
    expect(shown).to_have_count(0)
    stage.backend.keys[-1]["service_class"] = "exam.2027"
    student.reload()
    expect(student.get_by_text("my laptop").first).to_be_visible()
    settled(student)
    expect(student.get_by_text("exam.2027").first).to_be_visible()
    assert key not in student.content()
    assert key not in stage.log.read_text()
    click(student.get_by_role("button", name="Revoke").first)
    expect(student.get_by_text("revoked").first).to_be_visible()


def test_a_teacher_uploads_a_document_and_finds_it(
    stage: Stage, context: BrowserContext, tmp_path: Path
) -> None:
    page = context.new_page()
    sign_in(page, stage.url, "teacher", "teacher-password")
    go(page, "Course documents")
    expect(
        page.get_by_text("This PDF is encrypted; upload a copy without a password.")
    ).to_be_visible()
    file = tmp_path / "register-allocation.md"
    file.write_text("# Registers\n\n## Graph colouring\n\nAn interference graph is coloured.\n")
    page.locator("input[type=file]").set_input_files(str(file))
    expect(page.get_by_test_id("stFileChip")).to_be_visible()
    stage.backend.may_index.clear()
    click(page.get_by_role("button", name="Add to the course"))
    expect(page.get_by_text("1 uploaded; indexing has begun.")).to_be_visible()
    row = page.locator("[class*=st-key-document-]").filter(has_text="register-allocation.md")
    expect(row.last).to_contain_text("indexing")
    stage.backend.may_index.set()
    expect(row.last).to_contain_text("ready")
    settled(page)
    expect(row).to_have_count(1)
    go(page, "Search")
    page.get_by_role("searchbox").fill("interference graph coloured")
    page.get_by_role("searchbox").press("Enter")
    expect(page.locator("[class*=st-key-result-]").first).to_contain_text("interference graph")
    click(page.get_by_role("button", name="Open in the document").first)
    expect(page.get_by_role("dialog").locator("mark")).to_contain_text("Graph colouring")
    page.keyboard.press("Escape")
    go(page, "Course documents")
    settled(page)
    click(row.locator("[class*=st-key-remove-] button").first)
    click(page.get_by_role("button", name="Delete", exact=True))
    expect(row).to_have_count(0)
    click(page.get_by_role("tab", name="Members"))
    page.get_by_label("User name").fill("nobody")
    click(page.get_by_role("button", name="Add member"))
    expect(page.get_by_text("There is no user with this name.")).to_be_visible()


def test_an_administrator_sees_live_figures_and_makes_users(
    stage: Stage, context: BrowserContext
) -> None:
    page = context.new_page()
    sign_in(page, stage.url, "root", "root-password")
    go(page, "Monitoring")
    for title in ("Requests running", "Generated tokens/s", "TTFT p50", "TPOT p95"):
        expect(page.get_by_text(title, exact=True)).to_be_visible()
    expect(page.get_by_text("What each stage is doing")).to_be_visible()
    expect(page.get_by_text("368 in use · 470 cached · 1,210 free")).to_be_visible()
    expect(page.locator("[data-testid=stVegaLiteChart]").first).to_be_visible()
    go(page, "Users")
    click(page.get_by_text("New user"))
    page.get_by_label("User name", exact=True).fill("zhang")
    page.get_by_label("Display name").fill("张三")
    click(page.get_by_role("button", name="Create user"))
    password = page.locator(".st-key-one-time-password code")
    expect(password.first).to_be_visible()
    person = next(p for p in stage.backend.people if p.username == "zhang")
    expect(page.locator(".st-key-one-time-password")).to_contain_text(person.password)
    click(page.get_by_role("button", name="I have passed it on"))
    expect(password).to_have_count(0)
    click(page.locator(f".st-key-active-{person.id} button"))
    expect(page.locator(f".st-key-user-{person.id}")).to_contain_text("deactivated")
    assert person.active is False


def test_a_student_gets_no_page_of_another_role(stage: Stage, student: Page) -> None:
    links = student.get_by_test_id("stSidebarNav").get_by_role("link")
    expect(links).to_have_count(3)
    for path in ("users", "monitoring", "documents"):
        student.goto(f"{stage.url}/{path}")
        expect(student.get_by_test_id("stSidebarNav")).to_be_visible()
        settled(student)
        assert student.get_by_text("Requests running").count() == 0
        assert student.get_by_text("New user").count() == 0
        assert student.get_by_text("Choose files to upload").count() == 0


def test_a_one_time_password_is_changed_before_anything_else(
    stage: Stage, context: BrowserContext
) -> None:
    page = context.new_page()
    page.goto(stage.url)
    page.fill("#username", "fresh")
    page.fill("#password", "one-time-password")
    page.click("button[type=submit]")
    expect(page.get_by_text("This is a one-time password")).to_be_visible()
    page.goto(stage.url + "/search")
    expect(page.locator("#current")).to_be_visible()
    page.fill("#current", "one-time-password")
    page.fill("#new", "my own long words")
    page.fill("#again", "my own long words")
    page.click("button[type=submit]")
    expect(page.get_by_test_id("stChatInputTextArea")).to_be_visible()


def test_the_language_is_switched_and_kept(stage: Stage, student: Page) -> None:
    click(student.get_by_role("link", name="中文"))
    expect(student.get_by_text("想了解什么？")).to_be_visible()
    student.reload()
    expect(student.get_by_text("想了解什么？")).to_be_visible()
    click(student.get_by_role("link", name="English"))
    expect(student.get_by_text("What would you like to know?")).to_be_visible()


def test_a_phone_has_no_sideways_scrolling(stage: Stage) -> None:
    context = new_context(stage.browser, width=375, height=740)
    page = context.new_page()
    sign_in(page, stage.url, "student", "student-password")
    ask(page, "a question from the bus")
    expect(_answer(page)).to_be_visible()
    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    context.close()


def test_a_page_without_its_backend_says_so_and_comes_back(stage: Stage, student: Page) -> None:
    stage.backend.down = True
    try:
        student.reload()
        expect(student.get_by_text("cannot be reached at the moment")).to_be_visible()
    finally:
        stage.backend.down = False
    expect(student.get_by_test_id("stChatInputTextArea")).to_be_visible()
