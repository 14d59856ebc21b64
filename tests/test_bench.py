import json
from pathlib import Path

import pytest

from medclip_lab.bench.losses import bench_losses, contests, draw_losses
from medclip_lab.cli import main
from medclip_lab.errors import UserError


def test_contestants_compute_the_same() -> None:
    """A ratio between two different things would be none."""
    from medclip_lab.bench.losses import _inputs, _step

    for name, contest in contests().items():
        given = _inputs(contest, 24, 16, "cpu")
        assert float(contest.ours(given).detach()) == pytest.approx(float(contest.peer(given).detach()), rel=1e-5), name
        _step(contest.ours, given)
        ours = {key: value.grad.clone() for key, value in given.items() if value.grad is not None}
        _step(contest.peer, given)
        for key, gradient in ours.items():
            peer = given[key].grad
            assert peer is not None
            assert float((gradient - peer).norm()) <= 1e-4 * float(peer.norm()) + 1e-6, (name, key)


def test_bench_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "losses.json"
    arguments = ["--batch", "64", "--dim", "8", "--repeats", "2", "--only", "ClipLoss"]
    assert main(["bench", "losses", *arguments, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(out.read_text())
    assert (told["batch"], told["dim"]) == (64, 8)
    assert set(told["losses"]) == {"ClipLoss"}
    entry = told["losses"]["ClipLoss"]
    assert len(entry["seconds"]["ours"]) == len(entry["seconds"]["peer"]) == 2
    assert entry["peer"].startswith("open_clip")
    drawing = out.with_suffix(".svg").read_text()
    assert drawing.startswith("<svg xmlns=")
    assert "ClipLoss" in drawing


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"only": ["Clip"]}, "no loss is named Clip; there are SigLipLoss"),
        ({"batch": 0}, "sizes must be at least 1, got batch 0"),
        ({"device": "tpu"}, "no device 'tpu'"),
    ],
)
def test_bad_settings(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench_losses(**settings)  # type: ignore[arg-type]


def test_drawing_of_zero_memory(tmp_path: Path) -> None:
    entry = {"peer": "peer", "median_seconds": {"ours": 1.0, "peer": 2.0}, "peak_mib": {"ours": 0.0, "peer": 0.0}}
    draw_losses({"batch": 1, "dim": 1, "device": "cpu", "losses": {"ClipLoss": entry}}, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 200
