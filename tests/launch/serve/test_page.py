"""The page of the service in a real Chromium: `apt-get install chromium`, driven by playwright."""

import re
import shutil

import pytest

from tests.launch.serve.service import KEY, OTHER, PROMPT

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.slow
WIDTHS = (400, 1600)


@pytest.fixture(scope="module")
def browser():
    if (path := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    """The page, with the key given; nothing may have gone wrong in it at the end but what the service refuses."""
    context = browser.new_context(viewport={"width": 1600, "height": 900})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.goto(str(service.client.base_url))
    page.get_by_label("Key of this service").fill(KEY)
    page.get_by_role("button", name="Use it").click()
    page.get_by_text("magi-pocket").wait_for()
    yield page
    assert not [line for line in wrong if "responded with a status of 4" not in line]
    context.close()


def make(page, service, seconds):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seconds").fill(str(seconds))
    page.get_by_role("button", name="Make it", exact=True).click()
    return service.when(lambda: page.evaluate("location.hash.slice(1)"))


def is_playing(page):
    return page.evaluate("document.getElementById('video').currentTime > 0.2")


def check_widths(page):
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def change_the_prompt(page, service, name):
    """By the keyboard; first to one that the model does not know."""
    given, button = page.get_by_label("New prompt"), page.get_by_role("button", name="Change the prompt")
    given.press_sequentially("a purple cow")
    button.press("Enter")
    playwright.expect(page.get_by_role("alert")).to_contain_text("unknown word 'purple'")
    given.fill(OTHER)
    given.press("Tab")
    playwright.expect(button).to_be_focused()
    page.keyboard.press("Enter")
    told = page.get_by_role("status", name="What it shows")
    playwright.expect(told).to_contain_text(OTHER)
    [_, new] = service.get(name)["prompts"]
    playwright.expect(told).to_contain_text(f"From second {new['seconds']:g} on: {OTHER}")
    playwright.expect(page.get_by_role("alert")).to_have_count(0)
    check_widths(page)


def test_a_video_is_made_and_plays_before_it_is_finished_also_after_a_reload(page, service):
    name = make(page, service, 16)
    taken = page.locator("#map")
    service.when(lambda: re.match("[1-9]", taken.get_attribute("aria-label")))
    service.when(lambda: is_playing(page))
    assert service.get(name)["status"] == "in_progress"
    change_the_prompt(page, service, name)
    before = taken.get_attribute("aria-label")
    service.when(lambda: taken.get_attribute("aria-label") != before)
    page.screenshot(path=service.folder / "making.png")
    page.reload()
    service.when(lambda: is_playing(page))
    page.get_by_text("The video is finished").wait_for(timeout=120_000)
    playwright.expect(taken).to_have_attribute("aria-label", re.compile(" 0 not yet taken"))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == f"{name}.mp4"
    assert page.locator("#change").is_hidden()
    check_widths(page)


def test_a_video_is_cancelled_and_deleted_by_the_keyboard(page, service):
    name = make(page, service, 40)
    service.wait(name, "in_progress")
    playwright.expect(page.locator("#cancel")).to_be_enabled()
    page.locator("#cancel").press("Enter")
    page.get_by_text("The video was cancelled").wait_for()
    assert service.get(name)["status"] == "cancelled"
    page.get_by_role("button", name="Delete").press("Enter")
    page.get_by_text("The video was deleted").wait_for()
    assert service.client.get(f"/v1/videos/{name}").status_code == 404


def test_an_error_is_shown_in_words(page):
    page.get_by_label("Prompt", exact=True).fill("a purple cow")
    page.get_by_role("button", name="Make it", exact=True).click()
    playwright.expect(page.get_by_role("alert")).to_contain_text("unknown word 'purple'")
