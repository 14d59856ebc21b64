"""Which checkpoints of a run there are, which are kept, and from which it goes on."""

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec

from medclip_lab.data.remote import shown
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder
from medclip_lab.training.checkpoint_files import MANIFEST, DamagedError, manifest_of, remove, verify

NAME = re.compile(r"step-(\d{8})")


@dataclass
class CheckpointConfig:
    """When a run saves, what it keeps, and where."""

    every: int = 500
    """Steps between checkpoints. One is written at the end too."""
    minutes: float = 0.0
    """Minutes between checkpoints, whatever the steps; 0 counts steps only."""
    keep_last: int = 2
    """How many of the newest are kept. From the one before the newest a run goes on if the newest is damaged."""
    keep_best: bool = False
    """Save after every validation that gave the lowest val_loss so far, and keep that one."""
    keep_every: int = 0
    """Keep those whose step this divides for ever; 0 keeps none but the last and the best."""
    remote: str | None = None
    """Folder elsewhere, such as s3://bucket/run, to which every checkpoint is copied once it is whole, and from which
    a run goes on where this machine has none newer. Only the ones that are kept stay there."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep_last < 1:
            raise ValueError(
                f"checkpoint.every and checkpoint.keep_last must be at least 1, got {self.every} and {self.keep_last}"
            )
        if self.minutes < 0 or self.keep_every < 0:
            raise ValueError(
                f"checkpoint.minutes and checkpoint.keep_every cannot be negative, got {self.minutes} and "
                f"{self.keep_every}"
            )
        if self.remote is not None and "://" not in self.remote:
            raise ValueError(f"checkpoint.remote is a URL such as s3://bucket/run, got {self.remote!r}")


def loud(line: str) -> None:
    """A line that nobody overlooks, of what went wrong and how the run goes on."""
    print(f"medclip-lab train: {line}", file=sys.stderr, flush=True)


class Store:
    """The checkpoints of a run: a folder here, and a copy elsewhere if the settings name a place. For rank 0."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def here(self) -> list[int]:
        """Steps that have a folder, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := NAME.fullmatch(path.name)))

    def newest_whole(self) -> Path | None:
        """The newest checkpoint with all its files as they were written, fetched if it lies elsewhere.

        A damaged one is passed over with a line on standard error. What an interrupted save left is removed.
        """
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            there = self._elsewhere()
        except Exception as error:  # to begin anew because a server is away would be a loss
            raise UserError(
                f"checkpoint.remote: cannot list {shown(str(self.config.remote))}: {type(error).__name__}: {error}"
            ) from None
        for step in sorted({*self.here(), *there}, reverse=True):
            for fetched in (False, True):
                if (fetched and step not in there) or (not fetched and not self.path(step).exists()):
                    continue
                try:
                    if fetched:
                        self._fetch(step)
                    verify(self.path(step))
                except (DamagedError, OSError) as error:
                    place = shown(f"{self.config.remote}/{self.path(step).name}") if fetched else self.path(step)
                    loud(f"checkpoint {place} is damaged and passed over: {error}")
                    continue
                return self.path(step)
        return None

    def settle(self) -> None:
        """After a save: copy the newest elsewhere, and remove here and there what need not be kept."""
        steps = self.here()
        keep = self._kept(steps)
        for step in steps:
            if step not in keep:
                remove(self.path(step))
        if self.config.remote is None:
            return
        try:
            self._send(steps[-1])
            system, root = fsspec.core.url_to_fs(self.config.remote)
            for step in self._elsewhere() - keep:
                if step < steps[-1]:
                    system.rm(f"{root}/{self.path(step).name}", recursive=True)
        except Exception as error:  # each file system has failures of its own
            loud(f"checkpoint {self.path(steps[-1]).name} was not copied to {shown(self.config.remote)}: {error}")

    def best(self) -> tuple[float, int] | None:
        """(val_loss, step) of the checkpoint with the lowest."""
        found = []
        for step in self.here():
            try:
                value = manifest_of(self.path(step))["metrics"].get("val_loss")
            except DamagedError:
                continue
            if value is not None:
                found.append((float(value), step))
        return min(found, default=None)

    def _kept(self, steps: list[int]) -> set[int]:
        keep = set(steps[-self.config.keep_last :])
        if self.config.keep_every:
            keep |= {step for step in steps if step % self.config.keep_every == 0}
        best = self.best() if self.config.keep_best else None
        return keep if best is None else keep | {best[1]}

    def _elsewhere(self) -> set[int]:
        if self.config.remote is None:
            return set()
        system, root = fsspec.core.url_to_fs(self.config.remote)
        try:
            names = [str(name).rstrip("/").rpartition("/")[2] for name in system.ls(root, detail=False)]
        except FileNotFoundError:
            return set()
        found = {int(match[1]): name for name in names if (match := NAME.fullmatch(name))}
        # The manifest is sent last: without it the rest did not arrive.
        return {step for step, name in found.items() if system.exists(f"{root}/{name}/{MANIFEST}")}

    def _send(self, step: int) -> None:
        system, root = fsspec.core.url_to_fs(self.config.remote)
        target = f"{root}/{self.path(step).name}"
        system.makedirs(target, exist_ok=True)
        for path in sorted(self.path(step).iterdir(), key=lambda path: path.name == MANIFEST):
            system.put_file(str(path), f"{target}/{path.name}")

    def _fetch(self, step: int) -> None:
        system, root = fsspec.core.url_to_fs(self.config.remote)
        temporary = self.folder / f".{self.path(step).name}.tmp"
        remove(temporary)
        temporary.mkdir(parents=True)
        for found in system.ls(f"{root}/{self.path(step).name}", detail=False):
            name = str(found).rpartition("/")[2]
            system.get_file(found, str(temporary / name))
        verify(temporary)
        remove(self.path(step))
        temporary.rename(self.path(step))


def room(folder: Path, size: int, config: CheckpointConfig) -> str | None:
    """What keeps the checkpoints of a run from fitting on their disk: one being written beside those that are kept.

    Args:
        size: bytes of one checkpoint, about.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.glob("step-*/*"))
    many = config.keep_last + 1 + config.keep_best
    free = shutil.disk_usage(folder).free
    if many * size <= free + there:
        return None
    return (
        f"checkpoint: {many} checkpoints of about {in_gb(size)} must fit in {folder}, and {in_gb(free + there)} are "
        "free: choose another --out, or lower checkpoint.keep_last"
    )


def in_gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"


def open_checkpoint(named: str) -> Path:
    """The whole checkpoint that `branch_from` names: a folder `step-...`, or the newest of a run.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = existing_folder(named, "branch_from")
    if not NAME.fullmatch(path.name):
        newest = Store(path / "checkpoints", CheckpointConfig()).newest_whole()
        if newest is None:
            raise UserError(f"branch_from: {path} has no whole checkpoint")
        return newest
    try:
        verify(path)
    except DamagedError as error:
        raise UserError(f"branch_from: {path} is no whole checkpoint: {error}") from None
    return path
