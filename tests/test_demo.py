"""The main job from beginning to end, on few studies and few steps."""

from pathlib import Path

import pytest

from medclip_lab import demo as demos
from medclip_lab.errors import UserError


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = demos._config

    def short(*arguments: object) -> object:
        config = whole(*arguments)  # type: ignore[arg-type]
        config.trainer.epochs = 1.0
        config.trainer.val_every = 0
        return config

    monkeypatch.setattr(demos, "_config", short)
    monkeypatch.setattr(demos, "IMAGE_SIZE", 64)
    out = tmp_path / "demo"
    result = demos.demo(out, seed=1, studies=200)
    assert set(result["macro_auroc"]) == {"model", "blurred image", "shuffled pairs"}
    assert all(0 <= value <= 1 for value in result["macro_auroc"].values())
    page = Path(result["page"]).read_text(encoding="utf-8")
    assert "<html" in page
    assert {path.name for path in out.iterdir()} >= {
        "shards",
        "run",
        "bundle",
        "index-images",
        "index-reports",
        "page.html",
    }
    first = (out / "run" / "model.safetensors").stat().st_mtime_ns

    capsys.readouterr()
    again = demos.demo(out, seed=1, studies=200)
    assert (out / "run" / "model.safetensors").stat().st_mtime_ns == first
    assert capsys.readouterr().err.count("reused") == 9
    assert again["macro_auroc"] == result["macro_auroc"]

    with pytest.raises(UserError, match="demo with other settings"):
        demos.demo(out, seed=2, studies=200)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        demos.demo(tmp_path / "other", studies=200)
