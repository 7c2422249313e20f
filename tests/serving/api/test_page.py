"""The page in a real browser: Debian's chromium, driven by playwright. Slow; skipped where either is missing."""

import json
import re
import shutil
import time
from urllib.parse import urlsplit

import pytest
from served import options_for, serving
from test_openai import wait_until_idle

from flextron.serving.api.options import Access

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page()
    page.errors, page.hosts = [], set()
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.hosts.add(urlsplit(request.url).netloc))
    page.goto(server.url)
    page.wait_for_selector(".health.ok")
    page.fill("#tokens", "20")
    yield page
    assert page.errors == []
    assert page.hosts <= {server.host, ""}  # "" is of data:
    page.close()


def send(page, text="The quick"):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send:not([hidden])")


def test_a_chat_shows_the_level_of_every_token(page):
    page.click("[data-kind=share]")
    page.fill(".slider", "1")
    assert "0.6x" in page.inner_text(".readout")
    send(page)
    titles = page.eval_on_selector_all(".token", "tokens => tokens.map(token => token.title)")
    assert len(titles) > 5
    assert {title.split(":")[0] for title in titles} == {"0.6x"}
    measured = page.inner_text(".measure")
    assert re.search(r"0\.6x ×\d+", measured)
    assert re.search(r"first token \d", measured)
    assert "ms a token" in measured
    send(page, "jumps over")
    assert page.locator(".mine").count() == page.locator(".answer").count() == 2


def test_side_by_side_asks_at_two_budgets(page):
    page.click("#view-two")
    page.locator(".slider").nth(0).fill("0")
    send(page)
    shown = [page.locator(".column").nth(place).locator(".token").first.get_attribute("title") for place in (0, 1)]
    assert [title.split(":")[0] for title in shown] == ["0.4x", "full"]


def test_a_time_is_a_budget_too(page):
    page.click("[data-kind=time]")
    page.fill(".time input", "6.5")
    send(page)
    assert re.search(r"tpot (kept|missed)", page.inner_text(".measure"))


def test_errors_are_shown(page):
    page.fill("#temperature", "5")
    send(page)
    assert "temperature is 5; it must lie between 0 and 2." in page.inner_text("[role=alert]")
    page.fill("#temperature", "0")
    send(page)
    assert page.locator(".token").count() > 5


def test_the_stop_button_stops(page, shared_engine, monkeypatch):
    quick = shared_engine._mixed.logits

    def slow(*step):
        time.sleep(0.01)  # or a tiny model is done before the button is pressed
        return quick(*step)

    monkeypatch.setattr(shared_engine._mixed, "logits", slow)
    page.fill("#tokens", "1900")
    page.fill("#prompt", "The quick")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".token")
    page.click("#stop")
    page.wait_for_selector("#send:not([hidden])")
    assert 0 < page.locator(".token").count() < 1900
    assert page.locator("[role=alert]").count() == 0
    wait_until_idle(shared_engine, 3)


def test_text_of_the_model_is_never_html(page):
    bad = "<img src=x onerror='window.broken = 1'><script>window.broken = 2</script>"
    choice = {"index": 0, "delta": {"content": bad}, "flextron": {"texts": [bad], "levels": ["full"]}}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    send(page, bad)
    assert page.inner_text(".answer .text") == page.inner_text(".mine") == bad
    assert page.evaluate("window.broken") is None
    assert page.locator("main img").count() == 0


def test_a_server_with_a_key_asks_for_it(browser, shared_engine, served_model):
    with serving(shared_engine, options_for(served_model), Access("secret")) as served:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_selector(".health.bad")
        assert page.inner_text("#health") == "needs the API key"
        page.fill("#key", "secret")
        page.press("#key", "Tab")
        page.wait_for_selector(".health.ok")
        page.fill("#tokens", "5")
        send(page)
        assert page.locator(".token").count() > 1
        page.close()


def test_everything_has_a_name_and_fits_small_screens(page):
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, canvas")].filter((element) =>
            !element.textContent.trim() && !element.getAttribute("aria-label") && !element.labels?.length).length"""
    )
    assert unnamed == 0
    for size in ({"width": 360, "height": 700}, {"width": 1280, "height": 720}):
        page.set_viewport_size(size)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
