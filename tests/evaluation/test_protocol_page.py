"""The page of every kind of protocol: what was asked stands in it, nothing comes from the network, no id is told."""

import re
from pathlib import Path

import numpy as np
import pytest

from medclip_lab.data.manifest import Manifest
from medclip_lab.evaluation.protocol_tasks import run_protocol
from medclip_lab.evaluation.protocols import ProtocolConfig, Sampling
from medclip_lab.inference.encoder import Encoder, load

DRAWN = Sampling(labels=["Cardiomegaly"], per_label=4)
ASKED = {
    "multi_label": ProtocolConfig(
        "several", "multi_label", "Two <findings>.", labels=["Cardiomegaly", "Edema"], expected={"studies": 7}
    ),
    "exclusive": ProtocolConfig("one", "exclusive", labels=["Cardiomegaly", "No Finding"]),
    "class_retrieval": ProtocolConfig("images", "class_retrieval", sampling=DRAWN, queries_per_label=2, ks=[1, 100]),
    "report_retrieval": ProtocolConfig("reports", "report_retrieval"),
}
SECTIONS = {
    "multi_label": {"asked", "findings", "curves", "making"},
    "exclusive": {"asked", "classes", "confusion", "making"},
    "class_retrieval": {"asked", "retrieval", "making"},
    "report_retrieval": {"asked", "retrieval", "making"},
}


@pytest.fixture(scope="module")
def encoder(toy_bundle: Path) -> Encoder:
    return load(toy_bundle, device="cpu")


@pytest.mark.parametrize("task", list(ASKED))
def test_a_page_of_every_task(encoder: Encoder, toy_shards: Manifest, tmp_path: Path, task: str) -> None:
    path, command = tmp_path / "page.html", "medclip-lab evaluate --protocol <b>"
    result = run_protocol(encoder, toy_shards.folder, ASKED[task], draws=20, page=path, command=command)
    page = path.read_text(encoding="utf-8")
    sections = SECTIONS[task]
    if task == "exclusive" and len(np.flatnonzero(np.sum(result["exclusive"]["confusion"]["counts"], axis=0))) < 2:
        sections = sections - {"confusion"}  # a model that answers the same to all confuses nothing that can be drawn
    assert set(re.findall(r'<section id="(\w+)"', page)) == sections
    assert set(re.findall(r'<a href="#(\w+)">', page)) - {"content"} == sections, "every section can be reached"
    for told in (result["list_hash"], result["bundle"], result["shards"], f"Protocol {ASKED[task].name}", "&lt;b&gt;"):
        assert told in page
    assert "<b>" not in page
    assert "<findings>" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert not re.search(r"\bnan\b|None\b|study-\d|patient-\d", page)
    for prompt in [told for of in result["prompts"].values() for told in of["positive"]]:
        assert (prompt in page) == (task != "report_retrieval"), "prompts stand there where they were asked"


def test_what_differs_from_the_original_is_told_above(encoder: Encoder, toy_shards: Manifest, tmp_path: Path) -> None:
    run_protocol(encoder, toy_shards.folder, ASKED["multi_label"], draws=20, page=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"Not the original list: {toy_shards.count('test')} studies, there 7." in page
    assert "not labelled in this data" in page, "a value that is missing has its reason"
    assert page.count('class="chart"') >= 3
