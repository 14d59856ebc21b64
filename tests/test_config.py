import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from medclip_lab.cli import build_parser
from medclip_lab.config import load_config, shipped, to_yaml
from medclip_lab.errors import UserError
from medclip_lab.inference.labelset import LabelSet
from medclip_lab.training.run import RunConfig


@dataclass
class Part:
    shards: str
    weight: float = 1.0


@dataclass
class Whole:
    parts: dict[str, Part] = field(default_factory=dict)
    more: list[Part] = field(default_factory=list)
    size: int = 8
    span: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_round_trip(tmp_path: Path) -> None:
    config = Whole({"a": Part("x", 2.0)}, [Part("y")], 4, (0.1, 0.2))
    assert load_config(Whole, write(tmp_path, to_yaml(config))) == config


def test_overrides_win(tmp_path: Path) -> None:
    path = write(tmp_path, "size: 2\nparts:\n  a: {shards: x}\n")
    config = load_config(Whole, path, ["--size=3", "--parts.a.weight=1e-4", "--parts.b.shards=y"])
    assert config == Whole({"a": Part("x", 1e-4), "b": Part("y")}, size=3)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("size: 2\nsizes: 3\n", [], r"run\.yaml:2: unknown key sizes; did you mean size\?"),
        ("parts:\n  a:\n    shards: x\n    wieght: 2\n", [], r"run\.yaml:4: unknown key parts\.a\.wieght; .*weight"),
        ("more:\n- shards: x\n- shards: y\n  wieght: 2\n", [], r"run\.yaml:4: unknown key more\.1\.wieght; .*weight"),
        ("size: many\n", [], r"run\.yaml:1: size: .*int.*many"),
        ("parts:\n  a: {shards: x}\n  b:\n    weight: heavy\n    shards: y\n", [], r"run\.yaml:\d: .*float.*heavy"),
        ("parts:\n  a: {weight: 2}\n", [], r"run\.yaml:\d: parts.*shards is missing"),
        ("size: 0\n", [], r"size must be at least 1, got 0"),
        ("size: 1\nsize: 2\n", [], r"run\.yaml:2: size stands twice, first in line 1"),
        ("size: [1\n", [], r"run\.yaml:\d: not YAML"),
        ("- 1\n", [], "a config is a mapping"),
        ("size: 1\n", ["--sise=2"], r"command line: unknown key sise; did you mean size\?"),
        ("size: 1\n", ["--size=x"], r"command line: size: .*int.*x"),
        ("size: 1\n", ["--size"], r"write overrides as --section\.name=value"),
    ],
)
def test_mistakes_name_the_place(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_config(Whole, write(tmp_path, text), overrides)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        load_config(Whole, tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(shipped("").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_run_configs_load(path: Path) -> None:
    config = load_config(RunConfig, path)
    assert config.data.sources
    assert path.read_text().startswith("# medclip-lab"), "a config's head is the command that runs it"


@pytest.mark.parametrize("path", sorted(shipped("cluster").glob("*")), ids=lambda path: path.name)
def test_cluster_examples_name_settings_that_exist(path: Path) -> None:
    text = path.read_text()
    settings = re.findall(r"--\w+\.[\w.]+=[\w.]+", text)
    assert settings
    load_config(RunConfig, shipped("phantom.yaml"), settings)
    if path.suffix == ".yaml":
        (worker,) = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"].values()
        (container,) = worker["template"]["spec"]["containers"]
        assert container["command"][-2:] == ["medclip_lab", "train"]
        build_parser().parse_known_args(["train", *container["args"]])
    else:
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert "medclip_lab train --config" in text or "medclip-lab train --config" in text


@pytest.mark.parametrize("path", sorted(shipped("labelsets").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_label_sets_load(path: Path) -> None:
    assert load_config(LabelSet, path).name == path.stem
