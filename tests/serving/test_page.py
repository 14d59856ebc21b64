"""The page, in a real browser: drop, edit, search, maps, refusals, keys, keyboard, dark and narrow."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")

from medclip_lab.serving import Settings, keys  # noqa: E402

from .conftest import Serving, encoded, png  # noqa: E402

expect = playwright.expect
expect.set_options(timeout=15_000)


@pytest.fixture(scope="module")
def address(toy_settings: Settings) -> Iterator[str]:
    with Serving(replace(toy_settings, local_scopes=("classify", "search", "text"))) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(address)
    expect(page.locator("#labelset option")).to_have_count(1)
    yield page
    # Nothing from elsewhere, and nothing the content policy or a script complained of but refusals that were meant.
    assert all(url.startswith((address, "data:", "blob:")) for url in page.asked)
    assert [text for text in page.complaints if "Failed to load resource" not in text] == []
    context.close()


def send(page: Any, content: bytes, name: str = "a.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "application/octet-stream", "buffer": content})


DROP = """([bytes, name]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
}"""


def test_a_dropped_image_gets_findings_and_cases_like_it(page: Any) -> None:
    page.evaluate(DROP, [list(png(1)), "film.png"])
    expect(page.locator(".bar")).to_have_count(14)
    expect(page.locator("#hits .hit")).to_have_count(12)
    expect(page.locator("#facts")).to_contain_text("70 x 50 pixels, grey")
    values = [float(text) for text in page.locator(".bar .value").all_text_contents()]
    assert values == sorted(values, reverse=True)
    assert page.locator(".bar .fill").first.evaluate("bar => bar.style.width") == "100%"
    expect(page.locator("#meaning")).to_contain_text("no probabilities")
    page.locator("#view-sent").check(force=True)
    assert page.locator("#picture").get_attribute("src").startswith("blob:")
    page.get_by_role("button", name="Remove").first.click()
    expect(page.locator(".bar")).to_have_count(0)
    expect(page.locator(".call")).to_be_visible()


def test_labels_are_edited_live(page: Any) -> None:
    send(page, png(2))
    expect(page.locator(".bar")).to_have_count(14)
    page.get_by_role("button", name="Edit a copy").click()
    expect(page.locator(".label")).to_have_count(14)
    page.get_by_role("button", name="Add a label").click()
    page.keyboard.type("ring shadow")
    expect(page.locator(".bar")).to_have_count(15)
    expect(page.locator(".bar .name", has_text="ring shadow")).to_be_visible()
    before = page.locator(".bar", has_text="Edema").locator(".value").text_content()
    row = page.locator(".label").nth(5)
    row.locator(".positive").fill("The heart is enlarged.\nCase 7.")
    expect(page.locator(".bar", has_text="Edema").locator(".value")).not_to_have_text(before)
    row.locator(".remove").click()
    expect(page.locator(".bar")).to_have_count(14)
    page.locator("#exclusive").check()
    expect(page.locator("#meaning")).to_contain_text("shares of 1")
    values = [float(text) for text in page.locator(".bar .value").all_text_contents()]
    assert sum(values) == pytest.approx(1, abs=0.02)


def test_a_finding_shows_where_it_comes_from(page: Any) -> None:
    send(page, png(3))
    button = page.locator(".bar .name").first
    button.click()
    expect(page.locator("#map")).to_be_visible()
    expect(page.locator("#map-note")).to_contain_text("does not show what is ill")
    assert button.get_attribute("aria-pressed") == "true"
    light = """async () => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [32, 32];
        const context = canvas.getContext("2d");
        context.drawImage(document.getElementById("map"), 0, 0);
        const alpha = [...context.getImageData(0, 0, 32, 32).data].filter((_, at) => at % 4 === 3);
        return [Math.min(...alpha), Math.max(...alpha)];
    }"""
    assert page.evaluate(light) == [0, 255]  # nothing over the lower half, and most where the map is highest
    button.click()
    expect(page.locator("#map")).to_be_hidden()


def test_a_map_that_is_empty_is_said_to_be(page: Any) -> None:
    def flat(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"map": encoded(png()), "lowest": 0.0, "highest": 0.0})

    page.route("**/v1/explain", flat)
    send(page, png(3))
    page.locator(".bar .name").first.click()
    expect(page.locator("#map-note")).to_contain_text("The map is empty")


def test_search_by_words(page: Any) -> None:
    page.locator("#index").select_option("reports")
    page.locator("#query").fill("The heart is enlarged.")
    page.keyboard.press("Enter")
    expect(page.locator("#hits .hit")).to_have_count(12)
    expect(page.locator("#cases-note")).to_contain_text("The heart is enlarged.")
    expect(page.locator(".report")).to_have_count(0)
    page.locator("#with-text").check()
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator(".report").first).to_contain_text("Case")


def test_what_is_refused_is_told_in_the_service_s_words(page: Any) -> None:
    send(page, b"<svg onload='alert(1)'/>", "a.png")
    expect(page.locator("#problem")).to_contain_text("send PNG, JPEG, TIFF, WebP or DICOM")
    expect(page.locator("#problem")).to_contain_text("request ")
    assert page.locator("#problem-text").get_attribute("role") == "alert"
    send(page, png(1))
    expect(page.locator(".bar")).to_have_count(14)
    expect(page.locator("#problem")).to_be_hidden()
    page.get_by_role("button", name="Edit a copy").click()
    page.locator(".label-name").first.fill("<img src=x onerror=alert(1)>")
    expect(page.locator(".bar .name", has_text="<img src=x")).to_be_visible()
    assert page.locator(".bar img").count() == 0
    page.locator(".positive").first.fill("word " * 100)
    expect(page.locator("#problem")).to_contain_text("shorten the label")


def test_dicom_with_several_frames(page: Any) -> None:
    pytest.importorskip("pydicom")
    from tests.data.test_dicom import RAMP, dicom

    send(page, dicom(np.stack([RAMP, RAMP[::-1]]), NumberOfFrames=2), "a.dcm")
    expect(page.locator("#problem")).to_contain_text("several frames")
    page.locator("#frame").fill("1")
    page.keyboard.press("Tab")
    expect(page.locator(".bar")).to_have_count(14)
    expect(page.locator("#facts")).to_contain_text("dcm")
    assert page.locator("#view-sent").is_disabled()


def test_a_key_is_asked_for_and_kept_in_memory_only(browser: Any, toy_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.new_key(path, ["classify"])
    with Serving(replace(toy_settings, keys=path)) as address:
        page = browser.new_page()
        page.goto(address)
        expect(page.locator("#key-form")).to_be_visible()
        page.locator("#key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text("The key is wrong")
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        send(page, png(1))
        expect(page.locator(".bar")).to_have_count(14)
        assert page.locator("#cases").is_hidden()  # no scope for it
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        page.close()


def test_everything_can_be_reached_by_keyboard(page: Any) -> None:
    send(page, png(1))
    expect(page.locator(".bar")).to_have_count(14)
    reached = set()
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"file", "labelset", "edit", "exclusive", "name", "query", "similar", "clear", "view-seen"} <= reached


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (768, "light"), (1280, "dark")])
def test_no_width_scrolls_sideways(browser: Any, address: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    send(page, png(1, (500, 420)))
    expect(page.locator(".hit")).to_have_count(12)
    page.locator(".bar .name").first.click()
    expect(page.locator("#map")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = os.environ.get("MEDCLIP_LAB_SCREENSHOTS")
    if folder:
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=str(Path(folder) / f"page-{scheme}-{width}.png"), full_page=True)
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, address: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    empty = axe.run(page).response["violations"]
    send(page, png(1))
    expect(page.locator(".hit")).to_have_count(12)
    page.locator(".bar .name").first.click()
    expect(page.locator("#map")).to_be_visible()
    page.get_by_role("button", name="Edit a copy").click()
    page.locator("#card-details summary").click()
    page.locator(".label .positive").first.fill("word " * 100)
    expect(page.locator("#problem")).to_be_visible()
    expect(page.locator("#bars.stale")).to_have_count(0)
    full = axe.run(page).response["violations"]
    serious = [
        (violation["id"], node["html"])
        for violation in empty + full
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
    assert serious == []
    context.close()


def test_every_field_has_a_name(page: Any) -> None:
    send(page, png(1))
    expect(page.locator(".bar")).to_have_count(14)
    page.get_by_role("button", name="Edit a copy").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")]
            .filter((field) => !field.closest("template") && !field.labels?.length && !field.textContent.trim())
            .map((field) => field.outerHTML)"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
