"""The chat page in a headless Chromium, against servers started as a user does; skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from serve_cases import PICTURES, Server, picture_message, running_server, serve_config, served
from vlmo_cases import plain

from mmdist.serving.page.routes import FILES, FOLDER

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell")
SHAPES = PICTURES / "shapes.png"
QUESTION = "What is in the picture?"
ANSWER = (PICTURES / "shapes.txt").read_text().strip()
FIGURES = re.compile(r"^\d+\stokens · ([\d.]+\stokens/s · )?first token \d\.\d\d\ss")
KEY = "open sesame"
WAIT_MS = 60_000  # on a busy machine
PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=WAIT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page in a browser of its own; nothing is asked of other servers, and no script fails."""
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Security" in message.text else None)
    page.on("request", lambda asked: asked.url.startswith((url, "blob:")) or wrong.append(asked.url))
    page.goto(url)
    expect(page.locator("#model")).not_to_have_text("mmdist")
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        yield page


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request at a time, small limits, and a key."""
    limits = ("max_media_mb=0.02", "max_image_pixels=20000", "max_pictures=1", "max_queue=15")
    words = ["model=llava_next", "world_size=1", "engine.max_num_seqs=1", *(f"server.{limit}" for limit in limits)]
    with running_server(tmp_path_factory.mktemp("strict"), *words, MMDIST_API_KEYS=KEY) as started:
        yield started


@pytest.fixture(scope="module")
def vlmo() -> Iterator[str]:
    with served(serve_config(plain("vlmo_vqa"), "vlmo")) as url:
        yield url


def attach(page: Page, *paths: Path) -> None:
    page.locator("#files").set_input_files(paths)
    expect(page.locator("#attached li")).to_have_count(len(paths))


def ask(page: Page, text: str = QUESTION) -> None:
    page.locator("#question").fill(text)
    page.get_by_role("button", name="Send").click()


def last_answer(page: Page) -> Any:
    return page.locator("article.assistant").last


def expect_answer(page: Page, text: str = ANSWER) -> None:
    expect(last_answer(page).locator(".text")).to_have_text(text)
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")


def expect_problem(page: Page, words: str) -> None:
    expect(page.locator("#problem")).to_contain_text(words)


def make_long(page: Page, num_tokens: int = 300) -> None:
    """The page's requests reach the server with ignore_eos."""

    def lengthen(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": num_tokens}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", lengthen)


def stop_early(page: Page) -> None:
    """Press Escape as soon as there are some words."""
    page.evaluate(
        """() => new MutationObserver((changes, observer) => {
            if (document.querySelector("article.running .text")?.textContent.length < 3) return;
            observer.disconnect();
            document.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
        }).observe(document.querySelector("#messages"), {subtree: true, characterData: true})"""
    )


def test_the_files_ask_nobody_else() -> None:
    names = {
        path.name: path.read_text() for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")
    }
    assert set(names) == set(FILES) | {"index.html"}
    for name, text in names.items():
        for address in re.findall(r"https?://[^\"' )]+|url\(|@import", text):
            assert address == "http://www.w3.org/2000/svg", (name, address)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "style="):
            assert word not in text, (name, word)
        for asked in re.findall(r"(?:src|href)=\"([^#\"]+)\"|from \"\./([^\"]+)\"", text):
            assert "".join(asked).removeprefix("page/") in FILES, (name, asked)


def test_headers(server: Server) -> None:
    with server.client() as client:
        for path, kind in (("/", "text/html"), *((f"/page/{name}", kind) for name, kind in FILES.items())):
            response = client.get(path)
            assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
            policy = response.headers["content-security-policy"]
            assert (
                policy.startswith("default-src 'none'; ")
                and "unsafe" not in policy
                and "trusted-types 'none'" in policy
            )
            assert response.headers["x-content-type-options"] == "nosniff"
        for path in ("/page/none.js", "/page/routes.py", "/page/..%2froutes.py", "/page/index.html"):
            assert client.get(path).status_code == 404


def test_what_the_page_knows(server: Server, vlmo: str) -> None:
    told = httpx.get(f"{server.url}/page/config").json()
    assert (told["model"], told["single_turn"], told["takes_video"]) == ("llava_next", False, False)
    assert (told["example"], told["example_prompt"], told["max_media_bytes"]) == (True, QUESTION, 20_000_000)
    assert httpx.get(f"{server.url}/page/example").content == SHAPES.read_bytes()
    assert httpx.get(f"{vlmo}/page/config").json()["single_turn"]


@needs_chromium
def test_a_conversation_about_a_picture(page: Page, server: Server) -> None:
    attach(page, SHAPES)
    ask(page)
    expect_answer(page)
    expect(last_answer(page).locator(".figures")).to_have_text(FIGURES)
    assert page.locator("article.user img").evaluate("image => image.naturalWidth") == Image.open(SHAPES).width
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Which object is on the left?")
    messages = sent.value.post_data_json["messages"]
    assert messages[:2] == [picture_message(QUESTION, SHAPES), {"role": "assistant", "content": ANSWER}]
    body = {"model": "llava_next", "messages": messages, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    expect_answer(page, answer["choices"][0]["message"]["content"])
    assert page.title() == "llava_next"


@needs_chromium
def test_answers_stream(page: Page) -> None:
    make_long(page, 40)
    page.evaluate(
        """() => { window.lengths = new Set(); new MutationObserver(() =>
            window.lengths.add(document.querySelector("article.running .text")?.textContent.length ?? 0)
        ).observe(document.querySelector("#messages"), {subtree: true, characterData: true}); }"""
    )
    ask(page, "Hello?")
    expect(last_answer(page).locator(".figures")).to_contain_text("40\u00a0tokens")
    expect(last_answer(page).locator(".figures")).to_contain_text("cut: the model takes no more")
    expect(last_answer(page).locator(".figures")).to_contain_text("\u00a0tokens/s · first token ")
    assert page.evaluate("window.lengths.size") > 10


@needs_chromium
def test_stop_and_regenerate(page: Page, server: Server) -> None:
    before = server.metric("generation_tokens_total")
    make_long(page)
    attach(page, SHAPES)
    stop_early(page)
    ask(page)
    figures = last_answer(page).locator(".figures")
    expect(figures).to_contain_text("stopped")
    assert 0 < int(figures.inner_text().split()[0]) < 300
    assert server.wait_for_metric("num_requests_running", 0)
    assert 0 < server.metric("generation_tokens_total") - before < 300
    expect(page.locator("#question")).to_be_focused()
    page.unroute_all()
    page.get_by_role("button", name="Regenerate").click()
    expect_answer(page)
    expect(page.locator("article")).to_have_count(2)


@needs_chromium
def test_history(page: Page) -> None:
    attach(page, SHAPES)
    ask(page)
    expect_answer(page)
    page.reload()
    expect_answer(page)
    expect(last_answer(page).locator(".figures")).to_have_text(FIGURES)
    expect(page.locator("article.user .text")).to_have_text(QUESTION)
    assert page.locator("article.user img").evaluate("async image => (await image.decode(), image.naturalWidth)") > 0
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, "Second?")
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")
    chats = page.locator("#chats .open")
    expect(chats).to_have_text(["Second?", QUESTION])
    chats.last.click()
    expect_answer(page)
    ask(page, "Which object is on the left?")  # a restored picture is sent again
    expect(page.locator("article")).to_have_count(4)
    expect(last_answer(page)).to_have_attribute("aria-busy", "false")
    assert last_answer(page).locator(".problem").is_hidden()
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name=f"Delete the chat: {QUESTION}").click()
    expect(page.locator("#chats .open")).to_have_text(["Second?"])
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(page.locator("#chats .open")).to_have_text(["Second?"])


@needs_chromium
def test_an_answer_that_a_reload_cuts_short(page: Page) -> None:
    make_long(page)
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    ask(page, "Hello?")
    expect(last_answer(page)).to_have_attribute("aria-busy", "true")
    expect(page.locator("#chats .open")).to_have_text(["Hello?"])
    page.unroute_all()
    page.reload()
    expect(last_answer(page).locator(".problem")).to_have_text("This answer was interrupted.")
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page).locator(".figures")).to_contain_text("token")


@needs_chromium
def test_with_the_keyboard_alone(page: Page) -> None:
    def press(*keys: str) -> None:
        for key in keys:
            page.keyboard.press(key)

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(12):
            press(key)
            focused = page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()")
            if focused == name:
                ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert ring == "solid", f"{name}: no visible focus"
                return
        raise AssertionError(f"no Tab leads to {name}")

    page.on("filechooser", lambda chooser: chooser.set_files(SHAPES))
    expect(page.locator("#question")).to_be_focused()
    tab_to("Add a picture", "Shift+Tab")
    press("Enter")
    expect(page.locator("#attached li")).to_have_count(1)
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("What is")
    press("Shift+Enter", "Backspace")
    page.keyboard.type(" in the picture?")
    press("Enter")
    expect_answer(page)
    expect(page.locator("article.user .text")).to_have_text(QUESTION)
    expect(page.locator("#question")).to_be_focused()
    tab_to("Regenerate", "Shift+Tab")
    with page.expect_request("**/v1/chat/completions"):
        press("Enter")
    expect_answer(page)
    tab_to("Settings", "Shift+Tab")
    press("Enter")
    expect(page.locator("#max-tokens")).to_be_focused()
    page.keyboard.type("3")
    press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    tab_to("New chat", "Shift+Tab")
    press("Enter")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type("Hello?")
    press("Enter")
    expect(last_answer(page).locator(".figures")).to_contain_text("cut at the most tokens")
    expect(last_answer(page).locator(".figures")).to_contain_text("3\u00a0tokens")
    expect(page.locator("#said")).to_contain_text("3\u00a0tokens")


TRANSFER = """async ([bytes, name, type, text]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name, {type}));
    if (text) transfer.items.add(text, "text/plain");
    return transfer;
}"""


@needs_chromium
def test_dropped_and_pasted_pictures(page: Page) -> None:
    data = [list(SHAPES.read_bytes()), "dropped.png", "image/png", ""]
    transfer = page.evaluate_handle(TRANSFER, data)
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#attached img")).to_have_attribute("alt", "dropped.png")
    paste = (
        "(transfer) => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: transfer, cancelable: true}))"
    )
    page.evaluate_handle(TRANSFER, data).evaluate(paste)
    expect(page.locator("#attached img")).to_have_count(2)
    page.evaluate_handle(TRANSFER, [*data[:3], "a text of an office program"]).evaluate(paste)
    page.get_by_role("button", name="Remove dropped.png").first.click()
    expect(page.locator("#attached img")).to_have_count(1)
    page.get_by_role("button", name="dropped.png: show it large").click()
    expect(page.locator("#large-picture")).to_be_visible()
    page.keyboard.press("Escape")
    ask(page)
    expect_answer(page)


@needs_chromium
def test_the_example(page: Page) -> None:
    page.get_by_role("button", name="Try the example").click()
    expect(page.locator("#question")).to_have_value(QUESTION)
    page.get_by_role("button", name="Send").click()
    expect_answer(page)


@needs_chromium
def test_pictures_beyond_the_limits_are_refused_in_place(
    browser: Browser, strict_server: Server, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    Image.new("RGB", (201, 100)).save(tmp_path / "wide.png")
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "one.png")
    with opened(browser, strict_server.url) as page:
        for name, words in (
            ("notes.txt", "notes.txt: expected a picture (PNG, JPEG, WEBP, BMP, GIF)."),
            ("broken.png", "broken.png: this picture cannot be read."),
            ("wide.png", "wide.png: 201 × 100 pixels are more than the 20,000 this server takes."),
            ("noise.png", "are more than the 0.0 MB this server takes."),
        ):
            page.locator("#files").set_input_files(tmp_path / name)
            expect_problem(page, words)
            expect(page.locator("#attached li")).to_have_count(0)
        page.locator("#files").set_input_files([tmp_path / "one.png", tmp_path / "one.png"])
        expect_problem(page, "one.png: at most 1 pictures to a question.")
        expect(page.locator("#attached li")).to_have_count(1)
        page.get_by_role("button", name="Send").click()
        expect_problem(page, "Ask something about it.")


@needs_chromium
def test_a_key_and_a_busy_server(browser: Browser, strict_server: Server) -> None:
    with opened(browser, strict_server.url) as page:
        ask(page, "Hello?")
        expect(last_answer(page).locator(".problem")).to_contain_text("send an API key")
        page.get_by_role("button", name="Enter a key").click()
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        with all_places_taken(strict_server):
            page.get_by_role("button", name="Try again").click()
            expect(last_answer(page).locator(".problem")).to_contain_text("The server is busy: 16 requests")
        page.get_by_role("button", name="Try again").click()
        expect(last_answer(page).locator(".figures")).to_contain_text("token")
        assert last_answer(page).locator(".problem").is_hidden()
        stored = page.evaluate("JSON.stringify(localStorage)")
        assert KEY not in stored and page.evaluate("sessionStorage.getItem('mmdist.key')") == KEY


@contextmanager
def all_places_taken(server: Server) -> Iterator[None]:
    """By one request for 16 answers that are computed one by one."""
    body = {
        "messages": [{"role": "user", "content": "?"}],
        "n": 16,
        "stream": True,
        "ignore_eos": True,
        "max_tokens": 400,
    }
    headers = {"Authorization": f"Bearer {KEY}"}
    with server.client() as client, client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        assert answer.status_code == 200
        yield
    assert server.wait_for_metric("num_requests_running", 0)


@needs_chromium
def test_a_server_that_does_not_answer(page: Page) -> None:
    page.context.set_offline(True)
    ask(page, "Hello?")
    expect(last_answer(page).locator(".problem")).to_have_text("The server does not answer.")
    expect(page.locator("#state")).to_have_text("The server does not answer.")
    page.context.set_offline(False)
    expect(page.locator("#state")).to_be_empty()
    page.get_by_role("button", name="Try again").click()
    expect(last_answer(page).locator(".figures")).to_contain_text("token")


EVIL = "<img src=x onerror='document.title=1'><script>document.title=2</script>"
STORE = """text => new Promise(done => {
    const chat = {id: "evil", title: text, updated: 1, messages: [
        {role: "user", text, media: []}, {role: "assistant", text, state: "done", figures: {}}]};
    indexedDB.open("mmdist").onsuccess = ({target}) => {
        const put = target.result.transaction("chats", "readwrite").objectStore("chats").put(chat);
        put.onsuccess = () => { localStorage.setItem("mmdist.chat", "evil"); done(); };
    };
})"""


@needs_chromium
def test_words_never_become_elements(page: Page) -> None:
    page.evaluate(STORE, EVIL)
    page.reload()
    expect(page.locator("article .text")).to_have_text([EVIL, EVIL])
    expect(page.locator("#chats .open")).to_have_text([EVIL])
    expect(page).to_have_title("llava_next")
    assert page.locator("article img").count() == 0


@needs_chromium
@pytest.mark.parametrize("scheme", ("light", "dark"))
def test_on_a_phone(browser: Browser, server: Server, scheme: Any) -> None:
    with opened(browser, server.url, color_scheme=scheme, **PHONE) as page:
        attach(page, SHAPES)
        page.locator("#question").fill("Unbreakable" * 30)
        page.locator("#question").press("Enter")  # a new line, where there is no keyboard beside the screen
        assert page.locator("#question").input_value().endswith("\n")
        page.get_by_role("button", name="Send").tap()
        expect(last_answer(page).locator(".figures")).to_contain_text("token")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.locator("#scroller").evaluate("scroller => scroller.scrollWidth") == 360
        expect(page.locator("#side")).not_to_be_in_viewport()
        page.get_by_role("button", name="Chats").tap()
        expect(page.locator("#new")).to_be_in_viewport()
        expect(page.locator("#new")).to_be_focused()
        page.get_by_role("button", name="Close the list of chats").tap()
        expect(page.locator("#new")).not_to_be_in_viewport()
        for name in ("Chats", "Settings", "Add a picture", "Send"):
            box = page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box is not None and min(box["width"], box["height"]) >= 40
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")


@needs_chromium
def test_a_model_without_conversations(browser: Browser, vlmo: str) -> None:
    """Each question goes alone, with the picture that stays."""
    with opened(browser, vlmo) as page:
        expect(page.locator("#hint")).to_contain_text("This model has no conversation")
        attach(page, SHAPES)
        for question in ("Which object is on the left?", "What color is the circle?"):
            body = {"model": "vlmo", "messages": [picture_message(question, SHAPES)]}
            answer = httpx.post(f"{vlmo}/v1/chat/completions", json=body, timeout=60).json()
            with page.expect_request("**/v1/chat/completions") as sent:
                ask(page, question)
            assert sent.value.post_data_json["messages"] == body["messages"]
            expect_answer(page, answer["choices"][0]["message"]["content"])
            assert last_answer(page).locator(".problem").is_hidden()


@needs_chromium
def test_kinds_of_files(page: Page) -> None:
    accepted = """async takes_video => (await import("./page/media.js")).acceptedTypes(
        {takes_video, formats: ["PNG", "JPEG"], containers: ["mp4", "asf"]})"""
    assert page.evaluate(accepted, False) == ["image/png", "image/jpeg"]
    assert "video/mp4" in page.evaluate(accepted, True)
