"""Cases on the page, in a real browser: filters, policies, pictures, like another; what happens when it goes wrong."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
playwright = pytest.importorskip("playwright.sync_api")

import medclip_lab  # noqa: E402
from medclip_lab.data.manifest import Manifest  # noqa: E402
from medclip_lab.retrieval.rag import Ask, calibrate_index  # noqa: E402
from medclip_lab.retrieval.router import Domain, build_router  # noqa: E402
from medclip_lab.serving import Settings, keys  # noqa: E402
from medclip_lab.serving.model import Model  # noqa: E402

from .conftest import Serving, png  # noqa: E402

expect = playwright.expect
expect.set_options(timeout=15_000)
CARD = """---
license: <b>other</b>
---
# A **bold** card
<img src=x onerror=alert(1)> and [a link](javascript:alert(1)) with `code`

| figure | value |
|---|---|
| AUROC | <script>alert(1)</script> |

- one
- two
```
x = 1
```"""


@pytest.fixture(scope="module")
def settings(
    toy_settings: Settings, toy_indexes: tuple[Path, Path], toy_shards: Manifest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Settings:  # fmt: skip
    """Everything an index can have: pictures, a calibration, a router over both."""
    folder, (films, reports) = tmp_path_factory.mktemp("cases"), toy_indexes
    given = Ask(k=5, other_patients=False)
    calibrate_index(
        medclip_lab.open_index(films),
        films.parent / "e",
        given,
        "contradictions",
        0.3,
        "score",
        folder / "careful.json",
    )
    build_router({path.name: Domain(path, path.parent / "e") for path in toy_indexes}, folder / "body.json")
    return replace(
        toy_settings,
        indexes=(films, reports, folder / "body.json"),
        calibrations=(folder / "careful.json",),
        thumbnails=tuple(f"{name}={toy_shards.folder}" for name in ("films", "body/films")),
        local_scopes=("classify", "search", "text", "thumbnails"),
    )


@pytest.fixture(scope="module")
def serving(settings: Settings) -> Iterator[Any]:
    serving = Serving(settings)
    with serving as address:
        yield serving, address


@pytest.fixture
def page(browser: Any, serving: Any) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.complaints = []
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(serving[1])
    expect(page.locator("#index option")).to_have_count(3)
    yield page
    assert [text for text in page.complaints if "Failed to load resource" not in text] == []
    context.close()


def find(page: Any, text: str = "The heart is enlarged.") -> None:
    page.locator("#query").fill(text)
    page.keyboard.press("Enter")
    expect(page.locator("#hits .hit").first).to_be_visible()
    expect(page.locator("#hits.stale")).to_have_count(0)


def test_a_filter_narrows_the_cases(page: Any) -> None:
    find(page)
    expect(page.locator("#hits .hit")).to_have_count(12)
    page.locator("#options summary").click()
    page.locator("#add-filter").click()
    expect(page.locator("#label-rows .which")).to_be_focused()
    page.locator("#label-rows .which").select_option("labels.Cardiomegaly")
    expect(page.locator("#active")).to_have_text("1 set")
    find(page)
    expect(page.locator(".hit .chips")).to_have_count(page.locator(".hit").count())
    page.locator("#label-rows .state").select_option("0")
    find(page)
    expect(page.locator(".hit .chips")).to_have_count(0)
    first = page.locator(".hit .more span").first.text_content()
    page.locator("#not-patient").fill(first.removeprefix("patient id "))
    expect(page.locator("#active")).to_have_text("2 set")
    find(page)
    assert first not in page.locator(".hit .more span").all_text_contents()
    page.locator("#reset").click()
    expect(page.locator("#label-rows .row")).to_have_count(0)
    assert page.locator("#not-patient").input_value() == ""
    expect(page.locator("#active")).to_be_hidden()


def test_policies_decide_how_many(page: Any) -> None:
    page.locator("#options summary").click()
    page.locator("#least").fill("0.999999")
    page.locator("#query").fill("The heart is enlarged.")
    page.keyboard.press("Enter")
    expect(page.locator("#cases-note")).to_contain_text("loosen a filter")
    page.locator("#least").fill("")
    page.locator("#policy").select_option("ratio")
    page.locator("#ratio").fill("1.0001")
    find(page)
    assert page.locator(".hit").count() < 12
    page.locator("#policy").select_option("calibrated careful")
    expect(page.locator("#policy-note")).to_contain_text("under 0.3")
    assert page.locator("#k").input_value() == "5"
    page.locator("#query").fill("The heart is enlarged.")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("The calibration holds for image queries")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(1)})
    expect(page.locator("#problem")).to_be_hidden()
    expect(page.locator("#cases-note")).to_contain_text("this image")
    assert page.locator(".hit").count() <= 5


def test_pictures_come_where_they_are_allowed(page: Any) -> None:
    find(page)
    expect(page.locator(".thumb img")).to_have_count(12)
    sizes = page.locator(".thumb").evaluate_all(
        "places => places.map((place) => [place.offsetWidth, place.offsetHeight])"
    )
    assert {tuple(size) for size in sizes} == {(108, 108)}  # the place was there before the picture
    assert page.locator(".thumb img").first.evaluate("image => image.naturalWidth") == 40
    assert page.locator(".thumb img").first.get_attribute("src").startswith("data:image/jpeg;base64,")
    page.locator("#index").select_option("reports")
    find(page)
    expect(page.locator(".thumb")).to_have_count(0)


def test_like_another_case_of_other_patients(page: Any) -> None:
    find(page)
    study = page.locator(".hit .study").first.text_content()
    patient = f"patient-{int(study.removeprefix('study-')) // 2}"
    page.get_by_role("button", name=f"More cases like {study}", exact=True).click()
    expect(page.locator("#cases-note")).to_contain_text(f"nearest to study {study}")
    assert study not in page.locator(".hit .study").all_text_contents()
    assert not any(f"{patient} " in text + " " for text in page.locator(".hit .more span").all_text_contents())


def test_a_router_asks_for_the_domain_of_words(page: Any) -> None:
    page.locator("#index").select_option("body")
    expect(page.locator("#router-line")).to_be_visible()
    page.locator("#query").fill("heart")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("name `domain`")
    page.locator("#router-domain").select_option("films")
    find(page)
    expect(page.locator("#cases-note")).to_contain_text("films of body")
    expect(page.locator(".thumb img")).to_have_count(12)


def test_a_full_house_says_so_and_is_asked_again(page: Any, serving: Any) -> None:
    gate = serving[0].app.state.house.gate
    gate.inside += gate.most
    page.locator("#query").fill("heart")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("Too many requests are waiting")
    gate.inside -= gate.most
    page.locator("#again").click()
    expect(page.locator("#hits .hit")).to_have_count(12)
    expect(page.locator("#problem")).to_be_hidden()


def test_a_service_that_is_gone(page: Any) -> None:
    page.context.set_offline(True)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(1)})
    expect(page.locator("#problem")).to_contain_text("The service does not answer")
    expect(page.locator("#similar")).to_be_disabled()
    page.context.set_offline(False)
    page.locator("#again").click()
    expect(page.locator(".bar")).to_have_count(14)


def test_a_key_that_is_withdrawn_is_asked_for_again(browser: Any, settings: Settings, tmp_path: Path) -> None:
    key = keys.new_key(tmp_path / "keys.json", ["classify", "search"])
    serving = Serving(replace(settings, keys=tmp_path / "keys.json"))
    with serving as address:
        page = browser.new_page()
        page.goto(address)
        page.locator("#key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#cases")).to_be_visible()
        find(page)
        expect(page.locator(".thumb")).to_have_count(0)  # the key has no scope for them
        assert page.locator("#text-line").is_hidden()
        serving.app.state.house.keys._entries.clear()
        page.locator("#query").press("Enter")
        expect(page.locator("#key-form")).to_be_visible()
        expect(page.locator("#problem")).to_contain_text("was withdrawn")
        page.close()


def tab_to(page: Any, name: str, most: int = 60) -> None:
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id || document.activeElement.className") == name:
            return
    raise AssertionError(f"no way to {name} by keyboard")


def test_a_search_by_keyboard_alone(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "query")
    page.keyboard.type("heart")
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert page.locator("#options").evaluate("node => node.open")
    tab_to(page, "add-filter")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # absent
    tab_to(page, "k")
    page.keyboard.press("Control+A")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    expect(page.locator("#hits .hit")).to_have_count(3)
    expect(page.locator(".chips")).to_have_count(0)
    tab_to(page, "like")
    page.keyboard.press("Enter")
    expect(page.locator("#cases-note")).to_contain_text("nearest to study")


def test_the_map_fades_by_keyboard(page: Any) -> None:
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(3)})
    page.locator(".bar .name").first.click()
    expect(page.locator("#map")).to_be_visible()
    page.locator("#opacity").focus()
    page.keyboard.press("Home")
    assert page.locator("#map").evaluate("map => getComputedStyle(map).opacity") == "0"
    page.keyboard.press("End")
    assert page.locator("#map").evaluate("map => getComputedStyle(map).opacity") == "1"


def test_a_model_card_is_text(browser: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "card", property(lambda _: CARD))
    with Serving(settings) as address:
        page = browser.new_page()
        page.goto(address)
        page.locator("#card-details summary").click()
        card = page.locator("#card")
        expect(card.locator("h3")).to_have_text("A bold card")
        assert card.locator("dd").text_content() == "<b>other</b>"
        expect(card.locator("p")).to_have_text(
            "<img src=x onerror=alert(1)> and a link (javascript:alert(1)) with code"
        )
        assert card.locator("th").all_text_contents() == ["figure", "value"]
        assert card.locator("td").all_text_contents() == ["AUROC", "<script>alert(1)</script>"]
        assert card.locator("li").all_text_contents() == ["one", "two"]
        expect(card.locator("pre")).to_have_text("x = 1")
        assert card.locator("img, script, a, b").count() == 0
        page.close()


CALIBRATED = {"probability": 0.7, "threshold": 0.4, "decision": True, "operating": 0.6, "reason": None}


def test_what_is_calibrated_and_what_is_not(page: Any) -> None:
    """A label without a probability does not stand among those with one, and an image from elsewhere is flagged."""

    def changed(route: Any) -> None:
        answer = route.fetch().json()
        labels = answer["results"][0]["labels"]
        labels[2] |= CALIBRATED
        labels[3] |= CALIBRATED | {"probability": 0.2, "decision": False}
        labels[4] |= {"score": 5.0, "reason": "1 of one class"}
        answer["results"][0]["out_of_domain"] = {"distance": 20.0, "threshold": 9.5, "flag": True}
        route.fulfill(json=answer)

    page.route("**/v1/classify", changed)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png(3)})
    expect(page.locator("#flag")).to_contain_text("unlike those the model was calibrated with")
    expect(page.locator("#domain-note")).to_contain_text("20.0; flagged above 9.5")
    rows = page.locator("#bars > li")
    assert rows.nth(0).locator(".value").text_content() == "0.700"
    assert rows.nth(0).locator(".mark").evaluate("mark => mark.style.left") == "calc(40% - 1px)"
    expect(rows.nth(0)).to_contain_text("Above its threshold of 0.400")
    expect(rows.nth(1)).to_contain_text("Below its threshold")
    expect(rows.nth(2)).to_contain_text("scores, and no probabilities")
    expect(rows.nth(3)).to_contain_text("1 of one class")
    assert rows.nth(3).locator(".fill").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (390, "dark"), (1280, "dark")])
def test_cases_fit_and_can_be_read_by_all(browser: Any, serving: Any, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(serving[1])
    expect(page.locator("#index option")).to_have_count(3)
    page.locator("#options summary").click()
    page.locator("#add-filter").click()
    page.locator("#policy").select_option("calibrated careful")
    page.locator("#policy").select_option("ratio")
    find(page)
    expect(page.locator(".thumb img")).to_have_count(page.locator(".hit").count())
    page.locator("#card-details summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.run(page).response["violations"]
    serious = [
        (violation["id"], node["html"])
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]
    assert serious == []
    folder = os.environ.get("MEDCLIP_LAB_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"cases-{scheme}-{width}.png"), full_page=True)
    context.close()
