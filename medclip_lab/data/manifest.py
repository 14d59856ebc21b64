"""What a folder of shards holds, here or elsewhere: its `manifest.json`, or a pattern of tars."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medclip_lab.data import remote
from medclip_lab.data.index import MAX_SAMPLES, scan
from medclip_lab.data.sample import SPLITS
from medclip_lab.data.writing import FORMAT, MANIFEST
from medclip_lab.errors import UserError
from medclip_lab.files import read_json


@dataclass(frozen=True)
class Shard:
    """One tar of a manifest."""

    url: str
    """A path of this machine, or a URL."""
    split: str
    samples: int
    bytes: int
    sha256: str
    """Empty where no manifest tells it."""

    @property
    def name(self) -> str:
        """File name without its folder."""
        return remote.shown(self.url).rpartition("/")[2]

    def local(self) -> Path:
        """Where it lies on this machine; one that lies elsewhere is fetched first.

        Raises:
            OSError: it cannot be fetched.
        """
        return remote.fetch(self.url, self.bytes or None, self.sha256) if remote.is_remote(self.url) else Path(self.url)


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard folder, as its `manifest.json` tells them."""

    folder: str
    """A path of this machine, a URL, or a pattern of either."""
    shards: tuple[Shard, ...]
    facts: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `folder/manifest.json`; of a pattern such as `shards/{a,b}-*.tar`, the manifests beside its shards.

        A shard of a pattern that no manifest lists is indexed by its headers. Its split is the one its name begins with
        ("val-00000.tar"), else "train".

        Raises:
            UserError: no manifest, another format, nothing that matches, or a shard that is missing.
        """
        folder = str(folder).removeprefix("file://")
        if remote.is_pattern(folder) and not Path(folder).is_dir():
            return cls._of_pattern(folder)
        if not remote.is_remote(str(folder)):
            folder = Path(folder).expanduser()
            if not folder.is_dir():
                raise UserError(f"shards: no such folder: {folder}")
        facts = _manifest_of(str(folder))
        shards = _listed(facts, str(folder))
        for shard in shards:
            if not remote.is_remote(shard.url) and not Path(shard.url).is_file():
                raise UserError(f"shards: {shard.url} is listed in the manifest and missing: prepare again")
        return cls(str(folder), shards, facts)

    @classmethod
    def _of_pattern(cls, pattern: str) -> Self:
        urls = remote.expand(pattern)
        if not urls:
            raise UserError(f"shards: nothing matches {remote.shown(pattern)!r}")
        listed: dict[str, dict[str, Shard]] = {}
        shards: list[Shard] = []
        labels: dict[str, Counter[str]] = {}
        for url in urls:
            folder = url.rpartition("/")[0] or "."
            if folder not in listed:
                facts = _manifest_of(folder, optional=True)
                listed[folder] = {shard.name: shard for shard in _listed(facts, folder)}
                for name, states in facts.get("labels", {}).items():
                    labels.setdefault(name, Counter()).update(states)
            shards.append(listed[folder].get(url.rpartition("/")[2]) or _counted(url))
        return cls(pattern, tuple(shards), {"labels": labels})

    def of_split(self, split: str) -> tuple[Shard, ...]:
        """The shards of one split, or of several: "train+val".

        Raises:
            UserError: there is no such split.
        """
        known = {shard.split for shard in self.shards}
        for name in split.split("+"):
            if name not in known:
                raise UserError(
                    f"shards: {remote.shown(self.folder)} has no split {name!r} (it has {', '.join(sorted(known))})"
                )
        return tuple(shard for shard in self.shards if shard.split in split.split("+"))

    def count(self, split: str) -> int:
        """Number of studies in a split."""
        return sum(shard.samples for shard in self.of_split(split))


def check_names(shards: Iterable[Shard]) -> None:
    """Refuse shards of one name, for who writes a file a shard.

    Raises:
        UserError: a pattern over several folders has such.
    """
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise UserError("shards: two of them have the same name: take them folder by folder")


def _manifest_of(folder: str, optional: bool = False) -> dict[str, Any]:
    """What the manifest of a folder says; {} if there may be none and there is none.

    Raises:
        UserError: there is none, it cannot be read, or is none of ours.
    """
    path = remote.join(folder, MANIFEST)
    if not remote.is_remote(folder):
        if optional and not Path(path).exists():
            return {}
        value: Any = read_json(Path(path), "shards")
    else:
        try:
            value = json.loads(remote.read_bytes(path))
        except remote.MissingError as error:
            if optional:
                return {}
            raise UserError(f"shards: cannot read {remote.shown(path)}: {error}") from None
        except (remote.FetchError, ValueError, RecursionError) as error:
            # A server in trouble is no folder without a manifest: held-out shards would train.
            raise UserError(f"shards: cannot read {remote.shown(path)}: {error}") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = value.get("format") if isinstance(value, dict) else type(value).__name__
        raise UserError(f"shards: the manifest of {remote.shown(folder)} has format {found!r}, not {FORMAT!r}")
    return value


def _listed(facts: dict[str, Any], folder: str) -> tuple[Shard, ...]:
    entries, labels = facts.get("shards", []), facts.get("labels", {})
    where = f"shards: the manifest of {remote.shown(folder)}"
    if not isinstance(entries, list) or not isinstance(labels, dict):
        raise UserError(f"{where} lists no shards")
    for states in labels.values():
        if not isinstance(states, dict) or not all(_number(count) for count in states.values()):
            raise UserError(f"{where} has counts of labels that are none")
    return tuple(_shard(entry, folder, where) for entry in entries)


def _shard(entry: Any, folder: str, where: str) -> Shard:
    try:
        name, split, samples, size, sha256 = (entry[key] for key in ("name", "split", "samples", "bytes", "sha256"))
    except (TypeError, KeyError):
        raise UserError(f"{where} has an entry without name, split, samples, bytes and sha256") from None
    if not isinstance(name, str) or "/" in name or name.startswith("."):
        raise UserError(f"{where} names a shard outside of its folder")
    if split not in SPLITS or not _number(samples) or samples > MAX_SAMPLES or not _number(size):
        raise UserError(f"{where} has impossible numbers, or a split that is none of {', '.join(SPLITS)}")
    return Shard(remote.join(folder, name), split, samples, size, str(sha256))


def _number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _counted(url: str) -> Shard:
    """A shard that no manifest lists."""
    shard = Shard(url, _split_of(url), 0, 0, "")
    try:
        path = shard.local()
        with path.open("rb") as file:
            return Shard(url, shard.split, len(scan(file).entries), path.stat().st_size, "")
    except OSError as error:
        raise UserError(f"shards: cannot read {remote.shown(url)}: {error.strerror or error}") from None


def _split_of(url: str) -> str:
    begins = url.rpartition("/")[2].partition("-")[0]
    return begins if begins in SPLITS else "train"
