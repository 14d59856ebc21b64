"""What is declared is what is shipped: an explicit list of packages can silently miss a new one."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_declared_packages_are_those_on_disk() -> None:
    mapped = {"losses": "medclip_lab.losses", "configs": "medclip_lab.configs"}
    found = set()
    for top in ("medclip_lab", *mapped):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if parts[:2] != ("medclip_lab", "losses"):  # the link: the same files, reached through losses/
                found.add(".".join([mapped.get(parts[0], parts[0]), *parts[1:]]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_link_is_a_link() -> None:
    link = ROOT / "medclip_lab" / "losses"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "losses"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "tree"
    # Building writes build/ and egg-info into the tree: build a copy of what git knows.
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if names.returncode != 0:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        file = ROOT / name
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_symlink():
            target.symlink_to(file.readlink())
        elif file.exists():
            target.write_bytes(file.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"medclip_lab"}
    for wanted in (
        "medclip_lab/py.typed",
        "medclip_lab/losses/siglip.py",
        "medclip_lab/configs/phantom.yaml",
        "medclip_lab/configs/labelsets/chexpert14.yaml",
        "medclip_lab/evaluation/page.html.j2",
    ):
        assert wanted in names
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert f"{package.replace('.', '/')}/__init__.py" in names


def test_installed_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "losses.py").write_text("raise RuntimeError('a file of the user')\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import medclip_lab, medclip_lab.losses as l; "
        "from medclip_lab.config import shipped; from medclip_lab.cli import build_parser; build_parser(); "
        "print(medclip_lab.__file__); print(l.__file__); print(shipped('phantom.yaml').exists())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(target)], cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    package, losses, config = result.stdout.split()
    assert package.startswith(str(target))
    assert losses.startswith(str(target))
    assert config == "True"


def test_no_extra_brings_a_second_faiss() -> None:
    """All faiss packages install the same module, so only the extras `cpu` and `gpu` may name one, and one each."""
    extras = PROJECT["project"]["optional-dependencies"]
    with_faiss = {name: [line for line in lines if "faiss" in line] for name, lines in extras.items()}
    assert {name for name, lines in with_faiss.items() if lines} == {"cpu", "gpu"}
    assert all(len(lines) <= 1 for lines in with_faiss.values())
    everything = [*PROJECT["project"]["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert not any(line.replace(" ", "").startswith("open_clip_torch[") for line in everything)


@pytest.mark.parametrize("script", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_scripts_of_the_checkout_start(script: Path) -> None:
    result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
