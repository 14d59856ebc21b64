"""What this machine has and what of it does not fit together."""

import importlib.util
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path
from typing import Any

from medclip_lab.version import __version__

PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "transformers",
    "webdataset",
    "lightning",
    "safetensors",
    "pyarrow",
    "numpy",
    "pydicom",
    "triton",
)
# All of them install the module `faiss`; with two, the files of one overwrite those of the other.
FAISS = (
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "faiss-gpu-cu11",
    "faiss-gpu-cu12",
    "faiss-cuda",
    "faiss-cuda-cu128",
)
CUDA_OF_FAISS = {"faiss-gpu": 12, "faiss-gpu-cu12": 12, "faiss-gpu-cu11": 11, "faiss-gpu-cuvs": 13, "faiss-cuda": 13}
CUDA_OF_FAISS |= {"faiss-cuda-cu128": 12}
OF_CUDA = {
    13: "faiss-gpu-cuvs (the extra gpu): CUDA 13, one runtime beside torch's",
    12: "faiss-gpu: CUDA 12.6 or later, compute capability 7.0 to 9.0",
    11: "faiss-gpu-cu11: unofficial, compute capability 7.0 to 8.9",
}
"""Major CUDA version that torch was built for -> the faiss for it. Two CUDA versions in one process can crash."""


def examine(folder: Path) -> dict[str, Any]:
    """Versions, devices, CUDA majors, faiss packages, free disk at `folder`; and "problems", a line each."""
    problems: list[str] = []
    facts: dict[str, Any] = {
        "medclip_lab": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": memory_gib(),
        "versions": {name: _version(name) for name in PACKAGES},
    }
    facts["torch"] = _torch(problems)
    installed = sorted({dist.name.lower() for dist in distributions() if dist.name and dist.name.lower() in FAISS})
    facts["faiss"] = {name: version(name) for name in installed}
    if not installed:
        problems.append("no faiss: install one extra of medclip_lab, [cpu] or [gpu]; index and search need it")
    if len(installed) > 1:
        problems.append(
            f"{len(installed)} faiss packages ({', '.join(installed)}) install the same module: uninstall all, then one"
        )
    cuda = facts["torch"].get("cuda")
    facts["faiss_that_fits"] = fitting_faiss(cuda, bool(facts["torch"].get("devices")))
    facts["cuda_majors"] = {"torch": int(cuda.split(".")[0]) if cuda else None}
    for name in installed:
        facts["cuda_majors"][name] = major = CUDA_OF_FAISS.get(name)
        if major and cuda and major != facts["cuda_majors"]["torch"]:
            fits = facts["faiss_that_fits"].partition(":")[0]
            problems.append(f"{name} is built for CUDA {major} and torch for CUDA {cuda}: use {fits}, or faiss-cpu")
    free = shutil.disk_usage(folder).free / 2**30
    facts["free_disk_gib"] = round(free, 1)
    if free < 5:
        problems.append(f"{free:.1f} GiB of free disk at {folder}: shards and checkpoints will not fit for long")
    for requirement in requires("medclip_lab") or []:
        name = requirement.split(";")[0].split(">")[0].split("[")[0].strip()
        if "extra ==" not in requirement and _version(name) is None:
            problems.append(f"{name} is missing: install medclip_lab again")
    return facts | {"problems": problems}


def fitting_faiss(cuda: str | None, devices: bool) -> str:
    """Which faiss package goes with this torch, and why.

    Args:
        cuda: the version torch was built for, None for none.
        devices: whether there is a GPU to use.
    """
    if cuda is None or not devices:
        return "faiss-cpu (the extra cpu): no GPU that torch could share"
    return OF_CUDA.get(int(cuda.split(".")[0]), f"faiss-cpu (the extra cpu): no package for CUDA {cuda} is known")


def commit() -> str | None:
    """Of the checkout this runs from, with "-dirty" if files differ from it; None for an installed package."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    told = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - our own words
    return told.stdout.strip() or None


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Physical memory, where the system tells."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch(problems: list[str]) -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        problems.append("torch is missing: install medclip_lab again")
        return {}
    import torch

    facts: dict[str, Any] = {"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "devices": []}
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            facts["devices"].append({"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)})
    elif torch.version.cuda and Path("/proc/driver/nvidia").exists():
        problems.append("an NVIDIA driver is there, and torch cannot use it: the driver may be too old for this torch")
    return facts
