"""A service whose towers ONNX Runtime runs: the same answers, and what does not go together."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from starlette.testclient import TestClient

from medclip_lab.errors import UserError
from medclip_lab.inference.to_onnx import to_onnx
from medclip_lab.serving import Settings, create_app
from medclip_lab.serving.run import restored
from tests.serving.conftest import encoded, png


@pytest.fixture(scope="module")
def graphs(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("graphs") / "onnx"
    to_onnx(toy_bundle, out)
    return out


def test_answers_are_those_of_torch(toy_bundle: Path, graphs: Path) -> None:
    images = [{"data": encoded(png(seed))} for seed in range(3)]
    answers, features = [], []
    for onnx in (None, graphs):
        app = create_app(Settings(bundle=toy_bundle, onnx=onnx))
        with TestClient(app, base_url="http://localhost") as client:
            found = client.post("/v1/classify", json={"images": images}).json()["results"]
            answers.append([{label["label"]: label["score"] for label in one["labels"]} for one in found])
            made = client.post("/v1/embed", json={"images": images, "texts": ["Edema."]}).json()
            features.append([*made["images"], *made["texts"]])
            assert client.post("/v1/explain", json={"image": images[0], "label": "Edema"}).status_code == 200
    for torch_scores, onnx_scores in zip(*answers, strict=True):
        assert onnx_scores == pytest.approx(torch_scores, abs=1e-4)
    for torch_row, onnx_row in zip(*features, strict=True):
        assert onnx_row == pytest.approx(torch_row, abs=1e-4)


def test_further_processes_get_the_folder(toy_bundle: Path, graphs: Path) -> None:
    settings = Settings(bundle=toy_bundle, onnx=graphs)
    assert restored(json.loads(json.dumps(asdict(settings), default=str))) == settings


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"compile": True}])
def test_its_precision_is_its_own(toy_bundle: Path, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="--onnx brings its own precision"):
        Settings(bundle=toy_bundle, onnx=Path("onnx"), **options)  # type: ignore[arg-type]
