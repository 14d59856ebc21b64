"""What a folder of shards holds, here or elsewhere: its `manifest.json`, or a pattern of tars."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medclip_lab.data import remote
from medclip_lab.data.index import scan
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
        return self.url.rpartition("/")[2]

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
        if remote.is_pattern(str(folder)) and not Path(folder).is_dir():
            return cls._of_pattern(str(folder))
        if not remote.is_remote(str(folder)):
            folder = Path(folder).expanduser()
            if not folder.is_dir():
                raise UserError(f"shards: no such folder: {folder}")
        facts = _manifest_of(str(folder))
        if facts.get("format") != FORMAT:
            raise UserError(
                f"shards: {remote.join(str(folder), MANIFEST)} has format {facts.get('format')!r}, not {FORMAT!r}"
            )
        shards = _listed(facts, str(folder))
        for shard in shards:
            if not remote.is_remote(shard.url) and not Path(shard.url).is_file():
                raise UserError(f"shards: {shard.url} is listed in the manifest and missing: prepare again")
        return cls(str(folder), shards, facts)

    @classmethod
    def _of_pattern(cls, pattern: str) -> Self:
        urls = remote.expand(pattern)
        if not urls:
            raise UserError(f"shards: nothing matches {pattern!r}")
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
                raise UserError(f"shards: {self.folder} has no split {name!r} (it has {', '.join(sorted(known))})")
        return tuple(shard for shard in self.shards if shard.split in split.split("+"))

    def count(self, split: str) -> int:
        """Number of studies in a split."""
        return sum(shard.samples for shard in self.of_split(split))


def _manifest_of(folder: str, optional: bool = False) -> dict[str, Any]:
    path = remote.join(folder, MANIFEST)
    if not remote.is_remote(folder):
        return {} if optional and not Path(path).exists() else read_json(Path(path), "shards")
    try:
        value = json.loads(remote.read_bytes(path))
    except (remote.FetchError, ValueError) as error:
        if optional and isinstance(error, remote.FetchError):
            return {}
        raise UserError(f"shards: cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"shards: {path} holds a {type(value).__name__}, not an object")
    return value


def _listed(facts: dict[str, Any], folder: str) -> tuple[Shard, ...]:
    shards = []
    for entry in facts.get("shards", []):
        name = str(entry["name"])
        if "/" in name or name.startswith("."):
            raise UserError(f"shards: the manifest of {folder} names a shard outside of its folder")
        shards.append(
            Shard(remote.join(folder, name), entry["split"], entry["samples"], entry["bytes"], entry["sha256"])
        )
    return tuple(shards)


def _counted(url: str) -> Shard:
    """A shard that no manifest lists."""
    shard = Shard(url, _split_of(url), 0, 0, "")
    try:
        path = shard.local()
        return Shard(url, shard.split, len(scan(path).entries), path.stat().st_size, "")
    except OSError as error:
        raise UserError(f"shards: cannot read {url}: {error.strerror or error}") from None


def _split_of(url: str) -> str:
    begins = url.rpartition("/")[2].partition("-")[0]
    return begins if begins in SPLITS else "train"
