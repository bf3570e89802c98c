"""The page in a real browser:

Each kind of region gets the answer that `predict` gives for it, and a reload keeps the conversation.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.volumes.scans import some_values, write_nifti, write_series

axe = pytest.importorskip("axe_playwright_python.sync_playwright")
QUESTION = "Where is the lung?"


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "scan.png"
    pixels = np.random.default_rng(5).integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["wide", "narrow"])
def page(browser, server, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)  # a busy machine answers late
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    yield page
    assert page.problems == []
    page.close()


def open_picture(page, picture):
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#hint", state="hidden")


def drag(page, *places):
    """Moves the mouse over places of the picture, given as shares of the stage's width and height, with the button
    down.
    """
    box = page.locator("#stage").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def ask(page, question) -> tuple[str, dict]:
    """The answer that the page shows, and what it sent."""
    before = page.locator(".message.assistant").count()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.fill("#question", question)
        page.click("#send")
    page.wait_for_function("() => !document.getElementById('send').disabled")
    assert page.locator("#status.wrong").count() == 0, page.inner_text("#status")
    assert page.locator(".message.assistant").count() == before + 1
    return page.locator(".message.assistant span:not(.who)").last.text_content(), json.loads(sent.value.post_data)


def as_shown(answer: str) -> str:
    return answer.replace("<SEG>", "mask") or "(no answer)"


DRAWN = {
    "point": [[(0.5, 0.5)]],
    "box": [[(0.4, 0.3), (0.6, 0.7)]],
    "polygon": [[(0.4, 0.3)], [(0.6, 0.35)], [(0.5, 0.7)]],
    "scribble": [[(0.4, 0.3), (0.6, 0.35), (0.5, 0.7)]],
    "mask": [[(0.45, 0.4), (0.55, 0.6)]],
}


@pytest.mark.parametrize("tool", DRAWN)
def test_a_drawn_region_is_asked_about(page, picture, predictor, tool):
    open_picture(page, picture)
    page.click(f'[data-tool="{tool}"]')
    for stroke in DRAWN[tool]:
        drag(page, *stroke)
    shown, sent = ask(page, "What is <region>?")
    (region,) = sent["regions"]
    assert region["type"] == tool
    if tool == "mask":
        runs = np.repeat(np.arange(len(region["rle"]["counts"])) % 2, region["rle"]["counts"])
        reference = runs.reshape(region["rle"]["size"], order="F").astype(np.uint8)
        assert 0 < reference.mean() < 0.5
        path = picture.with_name("mask.png")
        Image.fromarray(reference * 255).save(path)
        reference = str(path)
    else:
        pairs = zip(region["points"][::2], region["points"][1::2], strict=True)
        reference = f"{tool}:" + " ".join(f"{x:.3f},{y:.3f}" for x, y in pairs)
    assert shown == as_shown(predictor(picture, "What is <region>?", reference).answer)


def test_an_example_is_asked_about_like_a_picture(page, picture, predictor):
    page.route("**/examples", lambda route: route.fulfill(json=["scan.png"]))
    page.route("**/examples/0", lambda route: route.fulfill(path=picture))
    page.reload()
    page.click("#examples button")
    page.wait_for_selector("#hint", state="hidden")
    assert ask(page, QUESTION)[0] == as_shown(predictor(picture, QUESTION).answer)


def test_a_reload_keeps_the_conversation(page, picture, predictor):
    open_picture(page, picture)
    shown, _ = ask(page, QUESTION)
    assert shown == as_shown(predictor(picture, QUESTION).answer)
    masks = page.locator("#layers li").count()
    page.reload()
    page.wait_for_selector(".message.assistant")
    assert page.locator(".message.assistant span:not(.who)").last.text_content() == shown
    page.wait_for_selector("#hint", state="hidden")
    assert page.locator("#layers li").count() == masks
    _, sent = ask(page, "What organ?")
    assert [message["role"] for message in sent["messages"]] == ["user", "assistant", "user"]


def test_nothing_overflows(page, picture):
    open_picture(page, picture)
    ask(page, QUESTION)
    wide = page.evaluate(
        """() => [...document.querySelectorAll("body *")]
        .filter((e) => e.getClientRects().length && !e.classList.contains("hidden")
                       && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1))
        .map((e) => e.tagName + "#" + e.id)"""
    )
    assert wide == []


def test_what_is_no_picture_is_said(page, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no picture")
    page.set_input_files("#file", str(path))
    page.wait_for_selector("#status.wrong")
    assert "cannot be shown" in page.inner_text("#status")


def test_a_region_can_be_taken_back(page, picture):
    open_picture(page, picture)
    page.click('[data-tool="box"]')
    drag(page, (0.4, 0.3), (0.6, 0.7))
    page.click("#undo")
    _, sent = ask(page, QUESTION)
    assert sent["regions"] == []


def serious(page) -> list[str]:
    """What axe-core finds to be a serious or critical fault of accessibility."""
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(page, picture, scheme):
    page.emulate_media(color_scheme=scheme)
    assert serious(page) == []
    open_picture(page, picture)
    ask(page, QUESTION)
    assert serious(page) == []


def test_a_scan_is_shown_segmented_and_saved(page, tmp_path):
    write_series(tmp_path / "scan", some_values((40, 48, 5)))
    page.set_input_files("#file", [str(path) for path in sorted((tmp_path / "scan").iterdir())])
    page.wait_for_selector("#scan:not([hidden])")
    page.wait_for_selector("#hint", state="hidden")
    assert page.inner_text("#place") == "3 / 5"
    page.select_option("#tone", "lung")
    page.locator("#stage").focus()
    page.keyboard.press("ArrowUp")
    page.wait_for_function("() => document.getElementById('place').value === '4 / 5'")
    page.fill("#structures", "lung; heart")
    page.click("#segment")
    page.wait_for_selector("#results button")
    assert "segmented" in page.inner_text("#status")
    for title, first in (("NIfTI", b"\x1f\x8b"), ("DICOM SEG", b"\0\0")):
        with page.expect_download() as saved:
            page.click(f"#results button:text-is('{title}')")
        assert Path(saved.value.path()).read_bytes().startswith(first)
    assert serious(page) == []
    page.reload()
    page.wait_for_selector("#results button")
    assert page.inner_text("#place") == "4 / 5" and page.input_value("#tone") == "lung"


def test_a_question_about_a_slice_is_that_about_its_picture(page, tmp_path):
    write_nifti(tmp_path / "scan.nii.gz", some_values((40, 48, 4)))
    page.set_input_files("#file", str(tmp_path / "scan.nii.gz"))
    page.wait_for_selector("#hint", state="hidden")
    _, first = ask(page, QUESTION)
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    masks = page.locator("#layers li").count()
    page.locator("#stage").focus()
    with page.expect_response("**/slices/3?*"):
        page.keyboard.press("ArrowUp")
    page.wait_for_function("() => document.getElementById('layers').children.length === 0")
    _, second = ask(page, QUESTION)
    assert len(second["messages"]) == 1 and second["messages"] != first["messages"]
    page.locator("#stage").focus()
    with page.expect_response("**/slices/2?*"):
        page.keyboard.press("ArrowDown")
    page.wait_for_function(f"() => document.getElementById('layers').children.length === {masks}")


def test_what_is_no_scan_is_said(page, tmp_path):
    (tmp_path / "notes.nii.gz").write_text("no scan")
    with page.expect_console_message():
        page.set_input_files("#file", str(tmp_path / "notes.nii.gz"))
        page.wait_for_selector("#status.wrong")
    assert "cannot be opened" in page.inner_text("#status")
    page.problems.clear()  # Chromium reports every answer that is an error
