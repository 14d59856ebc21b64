"""Every command of the README, as it stands there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medclip_lab.cli import build_parser, main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def verbs() -> Iterator[list[str]]:
    for command in COMMANDS:
        if command.startswith("medclip-lab "):
            yield shlex.split(command, comments=True)[1:]


def test_the_two_commands_are_there() -> None:
    starts = [command for command in COMMANDS if command.startswith("python3 -m venv")]
    assert len(starts) == 2
    assert starts[0].endswith("medclip-lab demo")
    assert starts[1].endswith("pytest")


def test_every_command_parses() -> None:
    found = list(verbs())
    assert len(found) > 8
    for arguments in found:
        build_parser().parse_known_args(arguments)


@pytest.mark.slow
def test_own_data_from_table_to_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The section on one's own data, run in its order on a table like the one it shows; the training is cut short."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "films").mkdir()
    header = re.search(r"```csv\n(.*?)\n", README)
    assert header
    assert header[1] == "image,report,patient"
    lines = [header[1]]
    for number in range(160):
        Image.fromarray((rng.random((64, 48)) * 255).astype(np.uint8)).save(tmp_path / "films" / f"{number}.png")
        finding = "Small left pleural effusion." if number % 2 else "No pleural effusion."
        lines.append(f'films/{number}.png,"FINDINGS: {finding} IMPRESSION: Case {number}.",p{number // 2}')
    (tmp_path / "studies.csv").write_text("\n".join(lines) + "\n")
    own = README.split("## Your own data")[1].split("\n## ")[0]
    ran = []
    for arguments in verbs():
        if shlex.join(["medclip-lab", *arguments]).split(" --")[0].split("#")[0].strip() not in own:
            continue
        extra = (
            ["--trainer.epochs=null", "--trainer.steps=3", "--data.batch_size=16"] if arguments[0] == "train" else []
        )
        assert main([*arguments, *extra]) == 0, arguments
        ran.append(arguments[0])
    assert ran[:4] == ["prepare", "train", "export", "evaluate"]
    assert {"embed", "index", "search", "classify"} <= set(ran)


def test_files_it_names_exist() -> None:
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (Path(__file__).parents[1] / name).exists(), name


def test_no_text_of_real_patients() -> None:
    """MIMIC marks removed identifiers with three underscores between spaces; nothing here may look like its reports."""
    root = Path(__file__).parents[1]
    mark = re.compile(r"(?<=\s)_{3}(?=[\s.,])")
    for folder in ("medclip_lab", "losses", "configs", "tests", "tools", "docs", "benchmarks"):
        for path in (root / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".yaml", ".md", ".json", ".txt", ".csv", ".html", ".j2"):
                assert not mark.search(path.read_text(encoding="utf-8")), path
