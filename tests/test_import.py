"""Importing the package costs nothing."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "lightning", "faiss", "transformers", "open_clip", "numpy", "pydicom", "fastapi")


@pytest.mark.parametrize("statement", ["import medclip_lab", "import medclip_lab.cli; medclip_lab.cli.build_parser()"])
def test_nothing_heavy_is_imported(statement: str) -> None:
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names() -> None:
    import medclip_lab

    assert medclip_lab.__all__ == ["__version__", "load", "open_index"]
    assert all(hasattr(medclip_lab, name) for name in medclip_lab.__all__)
