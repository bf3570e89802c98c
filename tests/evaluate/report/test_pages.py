"""The report in a real browser: nothing is cut off, cases are looked at, and their addresses can be sent."""

import json
import re

import pytest

from medplib_jax.evaluate.report import write_report
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.rescore import rescore
from tests.evaluate.report.sweep_fixture import CHECKPOINTS, write_sweep
from tests.evaluate.report.test_page import full_report

TASK = "MeCoVQA_Grounding_test"
# Elements that stick out of the page and are in nothing that scrolls.
CUT_OFF = """() => {
  const width = document.documentElement.clientWidth, found = [];
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    let scrolls = false;
    for (let parent = element.parentElement; parent; parent = parent.parentElement)
      scrolls ||= getComputedStyle(parent).overflowX !== "visible";
    if (box.width && box.height && !scrolls && box.right > width + 1)
      found.push(`${element.tagName} ${element.className} ${box.right} ${element.textContent.slice(0, 40)}`);
  }
  return [...found, ...(document.documentElement.scrollWidth > width + 1 ? ["page"] : [])];
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, 8, CHECKPOINTS[1:4:2])
    rescore(folder)
    return write_sweep_report(folder).as_uri()


@pytest.fixture
def open_page(browser):
    """Opens an address; whatever the page complains of is a failure."""
    problems, pages = [], []

    def open_one(address, width=1280, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        pages.append(page)
        page.set_default_timeout(60_000)  # a busy machine answers late
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.goto(address)
        return page

    yield open_one
    for page in pages:
        page.close()
    assert not problems


def current(page):
    return page.locator("section.task:not([hidden]) ol [aria-current]")


@pytest.mark.parametrize("width", [390, 768, 1280, 1920])
def test_nothing_is_cut_off(open_page, address, width):
    page = open_page(f"{address}#{TASK}/5", width)
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    assert page.evaluate(CUT_OFF) == []
    for number in range(page.locator(".tabs a").count()):
        page.evaluate("number => document.querySelectorAll('.tabs a')[number].click()", number)
        assert page.evaluate(CUT_OFF) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_cut_off_of_the_page_of_a_run(open_page, tmp_path, width):
    page = open_page(write_report(full_report(tmp_path), tmp_path).as_uri(), width)
    assert page.evaluate(CUT_OFF) == []


def test_a_sent_address_opens_its_case_and_keys_go_on_from_there(open_page, address):
    page = open_page(f"{address}#{TASK}/5")
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    assert current(page).get_attribute("data-record") == "5"
    captions = page.locator("section.task:not([hidden]) .pair figcaption").all_inner_texts()
    assert captions[0].startswith("truth") and len(captions) == 3
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => !location.hash.endsWith('/5')")
    record = current(page).get_attribute("data-record")
    assert page.evaluate("location.hash") == f"#{TASK}/{record}"
    before = page.locator("section.task:not([hidden]) .pair svg").first.get_attribute("viewBox")
    page.keyboard.press("+")
    zoomed = [one.get_attribute("viewBox") for one in page.locator("section.task:not([hidden]) .pair svg").all()]
    assert set(zoomed) != {before} and len(set(zoomed)) == 1  # both sides show the same place
    page.keyboard.press("0")
    assert page.locator("section.task:not([hidden]) .pair svg").first.get_attribute("viewBox") == before


def test_a_case_with_a_spacing_is_measured_in_millimetres(open_page, address):
    page = open_page(f"{address}#{TASK}/5")
    task = page.locator("section.task:not([hidden])")
    page.wait_for_selector("section.task:not([hidden]) .ruler")

    def rulers():
        return {
            (
                float(re.match(r"[\d.]+", bar.text_content())[0]),
                *map(
                    float,
                    re.fullmatch(r"M(\S+) (\S+)V(\S+)H(\S+)", bar.locator("path").first.get_attribute("d")).groups(),
                ),
            )
            for bar in task.locator(".ruler").all()
        }

    def check():
        ((mm, right, high, low, left),) = rulers()  # the same in every panel
        x, y, width, height = map(float, task.locator(".pair svg").first.get_attribute("viewBox").split())
        assert mm / (right - left) == pytest.approx(0.5) and mm / (low - high) == pytest.approx(0.8)
        assert x + width / 2 < left < right < x + width and y + height / 2 < high < low < y + height
        return mm

    before = check()
    for _ in range(4):
        page.keyboard.press("+")
    assert check() < before  # a shorter ruler where less is seen
    words = task.locator("[data-part=talk]").inner_text()
    assert "mm wide" in words and "truth" in words and "mm²" in words and "NSD at 2 mm" in words
    page.goto(f"{address}#{TASK}/6")  # a picture without a spacing
    page.wait_for_function(
        "() => document.querySelector('section.task:not([hidden]) ol [aria-current]').dataset.record === '6'"
    )
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    assert task.locator(".ruler").count() == 0 and "mm²" not in task.locator("[data-part=talk]").inner_text()


def test_failures_come_first_and_filters_leave_what_they_say(open_page, address):
    page = open_page(f"{address}#{TASK}/5")
    task = page.locator("section.task:not([hidden])")
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    scores = [int(text.split()[0]) for text in task.locator("ol b").all_inner_texts() if text != "–"]
    assert scores == sorted(scores) and len(scores) > 5
    task.locator("[data-part=most]").evaluate("e => { e.value = 80; e.dispatchEvent(new Event('change')); }")
    left = [int(text.split()[0]) for text in task.locator("ol b").all_inner_texts()]
    assert left == [score for score in scores if score <= 80]
    task.locator("[data-part=most]").evaluate("e => { e.value = 100; e.dispatchEvent(new Event('change')); }")
    task.locator("[data-part=modality]").select_option("ct")
    assert all("ct" in text for text in task.locator("ol small").all_inner_texts())


def test_a_case_is_saved_as_a_picture(open_page, address):
    page = open_page(f"{address}#{TASK}/5")
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    with page.expect_download() as download:
        page.keyboard.press("s")
    assert download.value.suggested_filename == f"{TASK}-5.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_cases_are_loaded_as_they_are_looked_at(open_page, address):
    page = open_page(address)
    page.wait_for_selector("#overview table")
    assert page.evaluate("performance.getEntriesByType('resource').length") <= 2
    assert "report_cases" not in json.dumps(page.evaluate("[...document.images].map(image => image.src)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(open_page, address, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = open_page(f"{address}#{TASK}/5", scheme=scheme)
    page.wait_for_selector("section.task:not([hidden]) .pair svg")
    found = axe.run(page).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"][:200]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []
