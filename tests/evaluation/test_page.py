"""The result page: nothing from outside, nothing unescaped, nothing that is no number, and charts that are XML."""

import base64
import hashlib
import io
import math
import re
from dataclasses import replace
from functools import lru_cache
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medclip_lab.evaluation import charts
from medclip_lab.evaluation.page import MAP_LIMIT, image_uri, render_page
from medclip_lab.evaluation.page_data import (
    MODEL,
    SECTIONS,
    ClassifiedImage,
    Command,
    FindingScore,
    ImageHit,
    ImageQuery,
    LabelCounts,
    LossCurve,
    MapPoint,
    PageData,
    Prediction,
    RetrievalScore,
    Sample,
    SplitCounts,
    TextHit,
    TextQuery,
    Tile,
    Timing,
    label_state,
)

EVIL = (
    "<script>alert('x')</script><img src=\"https://evil.example/x.png\" onerror=alert(1)> {{ 7 * 7 }} \"& '\x00\ud800"
)
LONG = "A finding whose name is far too long for the gutter of any chart that was ever drawn, and then some"
VOID = {"meta", "link", "img", "input", "br", "hr", "col"}


@lru_cache
def png(side: int = 224, seed: int = 0) -> bytes:
    grain = np.random.default_rng(seed).normal(110, 25, (side, side)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grain).save(buffer, format="PNG")
    return buffer.getvalue()


def full(text: str = "Small left pleural effusion. No pneumothorax.") -> PageData:
    """Every section filled, with `text` in every place that text can stand in."""
    findings = [f"Finding {i}" for i in range(12)] + [LONG, text]
    controls = {"blurred image": 0.61, text: 0.5}
    scores = [
        FindingScore(name=name, value=0.9, low=0.85, high=0.94, positives=30, negatives=70, controls=controls)
        for name in findings
    ]
    lonely = FindingScore(name="Fracture", value=None, positives=0, reason=f"only one class {text}", controls=controls)
    images = [png(seed=i) for i in range(6)]
    recall = {1: 0.11, 5: 0.3, 10: 0.41}
    chance = {1: 0.0025, 5: 0.0125, 10: 0.025}
    return PageData(
        title=f"Title {text}",
        lede=text,
        version="0.1.0",
        created="today",
        command=f"medclip-lab demo {text}",
        machine={"cpu": text},
        notes=["Not a medical device.", text],
        remarks=dict.fromkeys(SECTIONS, text),
        headline=[Tile(name=text, value="0.93 (0.92–0.94)", note=text)],
        splits=[SplitCounts(split=text, studies=3200, images=3300, patients=3000)],
        label_counts=[LabelCounts(finding=name, present=5, absent=70, uncertain=2, unmentioned=9) for name in findings],
        samples=[Sample(image=png(300, i), text=text, labels={text: "present", "b": "uncertain"}) for i in range(12)],
        loss_curves=[
            LossCurve(name="train", points=[(i, 5 / (1 + i / 50)) for i in range(900)]),
            LossCurve(name=text, points=[(300, 1.9), (600, 1.2), (900, 1.0)]),
        ],
        auroc_macro=replace(scores[0], name="Macro"),
        auroc=[*scores, lonely],
        retrieval=[
            RetrievalScore(direction=d, condition=c, recall=recall, chance=chance, median_rank=14, count=400)
            for d in ("image to text", text)
            for c in (MODEL, "blurred image", text)
        ],
        text_queries=[
            TextQuery(query=text, hits=[ImageHit(image=i, score=0.4, caption=text, match="own") for i in images])
        ]
        * 6,
        image_queries=[ImageQuery(image=images[0], caption=text, hits=[TextHit(text=text, score=0.4, match="shared")])],
        classified=[
            ClassifiedImage(image=i, caption=text, predictions=[Prediction(finding=f, score=0.7) for f in findings])
            for i in images
        ],
        embedding_map=[
            MapPoint(x=math.sin(i), y=math.cos(i * 7), group=(text, "b")[i % 2], modality="image", tooltip=text)
            for i in range(1500)
        ],
        timings=[Timing(step=text, seconds=61.0), Timing(step="train", seconds=4000, reused=True)],
        commands=[Command(step=text, command=f"medclip-lab search {text}")],
    )


class Reader(HTMLParser):
    """Elements, attributes and text of a page, as a browser would find them; unbalanced tags are an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_a_page_with_everything_is_sound_and_small() -> None:
    page = render_page(full())
    reader = Reader(page)
    assert len(page.encode()) < 3e6
    assert len(drawings(page)) > 20
    for section in SECTIONS:
        assert f"#{section}" in reader.values("href")
        assert reader.values("id").count(section) == 1
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(reader.values("alt")) == page.count("<img ")


def test_an_empty_page_has_no_sections() -> None:
    page = render_page(PageData(title="Nothing yet"))
    assert "<h1>Nothing yet</h1>" in page
    assert "<section" not in page
    assert "<svg" not in page
    Reader(page)


@pytest.mark.parametrize("name", ["samples", "loss_curves", "auroc", "retrieval", "image_queries", "embedding_map"])
def test_each_part_can_stand_alone(name: str) -> None:
    page = render_page(replace(PageData(title="Part"), **{name: getattr(full(), name)}))
    assert page.count("<section") == 1
    Reader(page)


def test_text_from_reports_stays_text() -> None:
    page = render_page(full(EVIL))
    reader = Reader(page)
    assert len(reader.scripts) == 1
    assert "alert" not in reader.scripts[0]
    assert "<script>alert" not in page
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in "".join(reader.text)
    page.encode()
    assert "\x00" not in page
    assert drawings(page)


def test_nothing_comes_from_outside() -> None:
    page = render_page(full(EVIL))
    reader = Reader(page)
    for value in reader.values("src", "href", "xlink:href", "srcset", "poster", "action", "data", "background"):
        assert value.startswith(("data:", "#")), value
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL)) + "".join(reader.values("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    assert "://" not in render_page(full())


def test_the_policy_lets_the_one_script_run_and_nothing_else() -> None:
    page = render_page(full())
    policy = next(v for v in Reader(page).values("content") if v.startswith("default-src"))
    script = Reader(page).scripts[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_is_missing_gives_its_reason_instead_of_a_number() -> None:
    nan, inf = math.nan, math.inf
    data = replace(
        full(),
        auroc=[
            FindingScore(name="Fracture", value=None, reason="no study has it"),
            FindingScore(name="Edema", value=nan, low=nan, high=inf, controls={"blurred image": nan}),
        ],
        loss_curves=[LossCurve(name="train", points=[(0, 3.0), (1, nan), (2, inf), (3, 2.0)])],
        retrieval=[RetrievalScore(direction="a to b", recall={1: nan}, chance={1: inf}, median_rank=nan, count=3)],
        classified=[ClassifiedImage(image=png(), predictions=[Prediction(finding="Edema", score=nan)])],
        embedding_map=[
            MapPoint(x=nan, y=0, group="a", modality="text"),
            MapPoint(x=1, y=1, group="a", modality="text"),
        ],
        timings=[Timing(step="train", seconds=inf)],
    )
    page = render_page(data)
    assert page.count("no study has it") == 3  # the wide chart, the narrow chart and the table
    assert "2 logged values were not a finite number" in page
    assert "1 of 2 points are drawn" in page
    reader = Reader(page)
    written = [*reader.text, *(value for _, name, value in reader.attributes if name != "src")]
    assert not [text for text in written if re.search(r"\b(nan|NaN|inf|Infinity|None)\b", text)]


def test_a_control_that_comes_close_is_counted() -> None:
    near = FindingScore(name="a", value=0.8, low=0.7, high=0.9, controls={"blurred image": 0.75})
    far = replace(near, name="b", controls={"blurred image": 0.6})
    below_chance = replace(near, name="c", low=0.45, controls={})
    page = render_page(PageData(title="t", auroc=[near, far, below_chance], auroc_macro=replace(far, name="Macro")))
    assert "<strong>1 of 3</strong>" in page


def test_a_control_looks_the_same_in_every_chart() -> None:
    page = render_page(full())
    colours = {
        c for icon, c in re.findall(r'<li><svg[^>]*>.*?class="(?:ring|solid) (c\d)".*?<span>(blurred image)', page)
    }
    assert len(colours) == 1


def test_a_crowded_map_is_thinned_and_its_small_groups_merged() -> None:
    points = [
        MapPoint(x=i % 91, y=i % 89, group=f"group {i % 20}", modality="text" if i % 2 else "image")
        for i in range(2 * MAP_LIMIT)
    ]
    page = render_page(PageData(title="t", embedding_map=points))
    marks = re.findall(r"<circle|<path", page.split('id="map"')[1].split("</svg>")[0])
    assert len(marks) == MAP_LIMIT
    # A stride of two over interleaved points would have dropped every text.
    assert 0.4 * MAP_LIMIT < marks.count("<circle") < 0.6 * MAP_LIMIT
    assert "other (13 groups)" in page
    assert f"of {len(points):,} points are drawn" in page
    assert len(page.encode()) < 250_000


def test_images_shrink_and_keep_sixteen_bits_readable() -> None:
    ramp = np.linspace(1000, 1200, 400 * 200).reshape(200, 400).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, format="PNG")
    uri = image_uri(buffer.getvalue(), 100)
    shrunk = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))
    assert shrunk.shape == (50, 100)
    assert shrunk.min() < 10
    assert shrunk.max() > 245
    with pytest.raises(ValueError, match="cannot read one of its images"):
        image_uri(b"no image", 100)


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no section is named 'clasification'"):
        PageData(title="t", remarks={"clasification": "x"})
    assert [label_state(value) for value in (1, 0, -1, None)] == ["present", "absent", "uncertain", "unmentioned"]


numbers = st.floats(-1e9, 1e9)


@given(numbers, st.floats(1e-6, 1e9), st.integers(2, 10), st.booleans())
def test_ticks_are_round_even_and_inside(low: float, span: float, count: int, whole: bool) -> None:
    high = low + span
    if span <= 1e-11 * max(1.0, abs(low), abs(high)):
        return
    found = charts.ticks(low, high, count, whole)
    assert all(low <= tick <= high for tick in found)
    assert len(found) <= count + 1
    if whole:
        assert all(abs(tick - round(tick)) < 1e-6 for tick in found if tick not in (low, high))
    else:
        assert len(found) >= max(1, count // 2 - 1)
    steps = np.diff(found)
    assert (steps > 0).all()
    assert np.ptp(steps) <= 1e-3 * span if len(steps) else True


def test_tick_labels_are_as_short_as_they_can_be() -> None:
    assert charts.tick_labels(charts.ticks(0, 1, 4)) == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert charts.tick_labels(charts.ticks(0, 4000, 4)) == ["0", "1,000", "2,000", "3,000", "4,000"]
    assert charts.tick_labels([-0.5, 0.0]) == ["−0.5", "0.0"]
    assert charts.ticks(0, 7, 8, whole=True) == [0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(("low", "high"), [(0, math.nan), (-math.inf, 1), (2, 2), (3, 1)])
def test_an_axis_without_a_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="axis"):
        charts.ticks(low, high)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 20))
def test_a_moving_mean_stays_within_its_values(values: list[float], window: int) -> None:
    means = charts.smooth(values, window)
    assert len(means) == len(values)
    assert min(values) - 1e-3 <= min(means)
    assert max(means) <= max(values) + 1e-3
    assert charts.smooth([2.0] * len(values), window) == [2.0] * len(values)


@given(st.text(max_size=80), st.floats(5, 400))
def test_a_fitted_text_fits(text: str, width: float) -> None:
    shown = charts.fit(text, width)
    assert charts.text_width(shown) <= max(width, charts.text_width("…"))
    if charts.text_width(" ".join(text.split())) <= width:
        assert shown == " ".join(text.split())


@given(
    st.text(max_size=40), st.lists(st.tuples(numbers, numbers), min_size=1, max_size=50), st.sampled_from([360, 808])
)
def test_any_line_chart_is_xml_within_its_frame(name: str, points: list[tuple[float, float]], width: int) -> None:
    line = charts.Line(name=name, points=points, css="c1")
    svg = charts.line_chart([line], width=width, x_label=name, y_label=name, description=name)
    root = ElementTree.fromstring(svg)
    for circle in root.iter("circle"):
        assert 0 <= float(circle.get("cx", "nan")) <= width
        assert 0 <= float(circle.get("cy", "nan")) <= 300


@pytest.mark.parametrize("width", [360, 808])
def test_the_marks_of_an_interval_plot_lie_on_its_axis(width: int) -> None:
    row = charts.DotRow(name=LONG, value=0.75, low=0.5, high=1.0, controls={"blur": 0.3}, note="0.75 (0.50–1.00)")
    svg = charts.interval_plot([row], controls={"blur": ("diamond", "c2")}, reference=0.5, width=width, description="d")
    root = ElementTree.fromstring(svg)
    centre = float(root.find("circle").get("cx"))  # type: ignore[union-attr,arg-type]
    start, end = map(float, re.search(r'd="M([\d.]+) [\d.]+H([\d.]+)"', svg).groups())  # type: ignore[union-attr]
    assert centre == pytest.approx((start + end) / 2, abs=0.2)
    assert end <= width
    names = [text for text in root.iter("text") if text.get("class") == "name"]
    assert names[0].text != LONG
    assert names[0].find("title").text == LONG  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_charts_refuse_what_is_no_number(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        charts.line_chart(
            [charts.Line(name="a", points=[(0, 1), (1, bad)], css="c1")],
            width=360,
            x_label="x",
            y_label="y",
            description="d",
        )
    row = charts.DotRow(name="a", value=bad)
    with pytest.raises(ValueError, match="finite"):
        charts.interval_plot([row], controls={}, reference=0.5, width=360, description="d")
    with pytest.raises(ValueError, match="finite"):
        charts.grouped_bars([charts.BarGroup(name="a", values=[bad])], series={"m": "c1"}, width=360, description="d")
    with pytest.raises(ValueError, match="finite"):
        charts.bar_rows([charts.BarRow(name="a", parts=[("c1", bad, "")])], width=360, description="d")
    with pytest.raises(ValueError, match="finite"):
        charts.scatter([charts.Dot(x=bad, y=0, group=0, hollow=False)], width=360, description="d")
