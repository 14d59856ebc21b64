"""Where a run goes on, and whether it may: a folder holds one run, and a checkpoint belongs to one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from medclip_lab.config import to_yaml
from medclip_lab.errors import UserError
from medclip_lab.files import read_json
from medclip_lab.training.checkpoint import Store, open_checkpoint
from medclip_lab.training.checkpoint_files import manifest_of
from medclip_lab.training.ranks import flat

CONFIG, FACTS, DONE = "config.yaml", "run.json", "done.json"
ALWAYS_FREE = ("out", "checkpoint", "survival", "ranks")
"""Sections of a config that are no part of what a run is: it may go on with others."""


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on."""

    path: Path | None = None
    """The checkpoint; None begins anew."""
    step: int = 0
    batch: int = 0
    """The first batch of the data's order that is still to come."""
    origin: Path | None = None
    """Folder of the run that a branch takes it from."""

    @property
    def ahead(self) -> int:
        """How many batches were left out so far."""
        return self.batch - self.step


def start_of(path: Path | None) -> Start:
    """Where a checkpoint that was verified goes on."""
    if path is None:
        return Start()
    manifest = manifest_of(path)
    return Start(path, int(manifest["step"]), int(manifest["batch"]))


def find_start(config: Any, resume: Literal["auto", "never"], store: Store, shards: dict[str, str]) -> Start:
    """Where a run goes on; `resume` as in `medclip_lab.training.run.train`.

    Raises:
        UserError: a checkpoint of another run, or one that cannot be read.
    """
    path = store.newest_whole()
    if path is None and config.branch_from:
        path = open_checkpoint(config.branch_from)
        return replace(start_of(path), origin=path.parent.parent)
    if path is None:
        return Start()
    if resume == "never":
        raise UserError(f"--resume never: {path.parent.parent} has checkpoints: remove it, or choose another --out")
    told = difference((path / CONFIG).read_text(encoding="utf-8"), to_yaml(config), moved=True)
    if told is None and manifest_of(path)["shards"] != shards:
        told = "its shards are others"
    if told is not None:
        raise UserError(f"checkpoint {path} is of another run: {told}. Choose another --out")
    return start_of(path)


def difference(there: str, here: str, moved: bool = False) -> str | None:
    """The first setting of what a run is that two configs in YAML say otherwise.

    Args:
        moved: whether the shards may lie elsewhere.
    """
    first, second = (flat(yaml.safe_load(text)) for text in (there, here))
    for name in dict.fromkeys([*second, *first]):
        if name.partition(".")[0] in ALWAYS_FREE or (moved and name.endswith(".shards")):
            continue
        if first.get(name) != second.get(name):
            return f"{name} is {first.get(name)!r} there and {second.get(name)!r} here"
    return None


def refuse_other_run(config: Any, facts: dict[str, Any], out: Path) -> None:
    """A folder holds one run: going on with another config or other data would mix two. Other ranks are no matter.

    Raises:
        UserError: which setting differs, or what of the data.
    """
    recorded = out / CONFIG
    if recorded.exists():
        told = difference(recorded.read_text(encoding="utf-8"), to_yaml(config))
        if told is not None:
            raise UserError(f"out: {out} holds a run with another config ({told}): choose another --out, or remove it")
    if not (out / FACTS).exists():
        return
    before = read_json(out / FACTS, "run")
    if before["shards"] != facts["shards"]:
        raise UserError(f"out: {out} holds a run on other data: the shards changed since. Choose another --out")
    if before["steps"] != facts["steps"] and not (out / DONE).exists():
        raise UserError(
            f"out: {out} was started with {before['steps']} steps, and this would be {facts['steps']}: go on as it was "
            "started"
        )
