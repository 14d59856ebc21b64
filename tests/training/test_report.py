"""The page that a run leaves behind."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from medclip_lab.training.console import METRICS, Diary
from medclip_lab.training.meter import Reading
from medclip_lab.training.report import REPORT, write_report
from medclip_lab.training.run import RunConfig

Config = Callable[..., RunConfig]
VOID = {"meta", "link", "br"}


class Checked(HTMLParser):
    """Well-formed, and asks the network for nothing."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("src", "srcset", "onload"), f"{tag} loads {value}"
            assert name != "href" or str(value).startswith(("#", "data:")), value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_a_run_leaves_a_page(toy_run: Path) -> None:
    page = (toy_run / REPORT).read_text()
    found = Checked(page)
    text = " ".join(" ".join(found.text).split())
    for title in ("Loss", "Learning rate", "Scale", "Bias", "Norm of the gradient", "Waiting for data", "Settings"):
        assert title in text, title
    assert "Steps 30 of 8 studies" in text
    assert "weight_decay: 0.05" in text
    assert "Unusable samples None." in text
    assert "open_clip_torch" in text
    assert found.tags.count("svg") >= 2 * 6, "each chart wide and narrow"
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://", page)


def test_what_happened_is_on_it(toy_config: Config, tmp_path: Path) -> None:
    file = Diary(tmp_path / METRICS)
    for step in range(1, 41):
        file.show(Reading(step, 40, {"loss": None if step == 7 else 3.0 / step, "pairs": 1.0, "grad_norm": None}))
        if step % 10 == 0:
            file.show(Reading(step, 40, {"val_loss": 1.0 + abs(step - 20)}))
    config = toy_config(tmp_path / "<script>alert(1)</script>")
    done = {"steps": 40, "seconds": 3725.0, "resumed_at": 20, "world_size": 2}
    unusable = {"toy": {"unreadable <image>": 3}}
    page = write_report(tmp_path, config, done | {"unusable": unusable}).read_text()
    found = Checked(page)
    text = " ".join(" ".join(found.text).split())
    assert "Time 1:02:05 since step 20, where it went on" in text
    assert "Least validation loss 1.0000 step 20" in text
    assert "toy unreadable <image> 3" in text
    assert "script" not in found.tags
    assert "alert(1)" in text
    assert "Terms of the loss" in text
    assert "Norm of the gradient" not in text, "nothing finite is no chart"


def test_a_run_without_a_single_reading_has_a_page(toy_config: Config, tmp_path: Path) -> None:
    done = {"steps": 1, "seconds": 1.0, "resumed_at": 0, "world_size": 1, "unusable": {}}
    assert "Settings" in "".join(Checked(write_report(tmp_path, toy_config(tmp_path), done).read_text()).text)
