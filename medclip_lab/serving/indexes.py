"""Indexes as the service has them: folders, collections of Milvus, routers over several; what each can be asked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from medclip_lab.errors import UserError
from medclip_lab.files import digest
from medclip_lab.retrieval.embeddings import Floats
from medclip_lab.retrieval.fields import Field, shared
from medclip_lab.retrieval.index import open_index
from medclip_lab.retrieval.risk import Calibration, read_calibration
from medclip_lab.retrieval.router import Router, open_router
from medclip_lab.retrieval.search import Store
from medclip_lab.serving.problems import Problem
from medclip_lab.serving.settings import Settings
from medclip_lab.serving.thumbnails import Pictures, open_pictures

ALONE = ""
"""The domain of an index that is no router's."""
TEXT = ("text", "text_key")
"""Columns that hold a report, or tell by a hash whether it is one that was guessed."""


@dataclass
class Served:
    """An index, or the indexes of a router by their domain, under one name."""

    name: str
    stores: Mapping[str, Store]
    router: Router | None = None
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    """By name; each holds for one of the stores."""
    pictures: dict[str, Pictures] = field(default_factory=dict)
    """Of the stores whose studies may be looked at, by domain."""

    @property
    def domains(self) -> list[str]:
        """Of a router; none else."""
        return [domain for domain in self.stores if domain != ALONE]

    def domain(self, named: str | None, image: Floats | None = None) -> str:
        """Which of the stores is asked: the named one, or for an image that whose mean is nearest.

        Raises:
            Problem: no such domain, or one has to be named.
        """
        if self.router is None:
            if named is not None:
                raise Problem(422, "domain", "this index is no router and has no domains: leave `domain` out")
            return ALONE
        told = ", ".join(self.domains)
        if named is not None:
            if named not in self.stores:
                raise Problem(404, "unknown-domain", f"the router has no such domain: name one of {told}")
            return named
        if image is None:
            raise Problem(422, "domain", f"only an image finds its domain by itself: name `domain`, one of {told}")
        return self.router.domains(image)[0]

    def hash(self, domain: str | None = None) -> str:
        """Of one of the stores, or of all; may ask a server."""
        hashes = {name: _hash(store) for name, store in self.stores.items() if domain in (None, name)}
        return hashes[ALONE] if ALONE in hashes else digest(hashes)

    def facts(self, domain: str | None = None) -> dict[str, Any]:
        """What every answer tells of it; may ask a server.

        Args:
            domain: which of the stores answered; None is of all.
        """
        stores = dict(self.stores) if domain is None else {domain: self.stores[domain]}
        modalities = {str(store.manifest.get("modality", "image")) for store in stores.values()}
        return {
            "name": self.name,
            "hash": self.hash(domain),
            "modality": modalities.pop() if len(modalities) == 1 else "both",
            "size": sum(len(store) for store in stores.values()),
            "domain": domain or None,
        }

    @cached_property
    def fields(self) -> list[Field]:
        """What conditions it takes, by a look at its rows."""
        return shared([store.fields() for store in self.stores.values()])

    def offers(self, text: bool) -> dict[str, Any]:
        """All it can be asked; may ask a server.

        Args:
            text: whether the caller may read reports, and so may ask with conditions on them.
        """
        fields = [vars(one) for one in self.fields if text or one.name not in TEXT]
        policies = ["fixed-k", "ratio", *(["calibrated"] if self.calibrations else [])]
        return self.facts() | {
            "domains": self.domains,
            "text_included": all(bool(store.manifest.get("text_included")) for store in self.stores.values()),
            "thumbnails": bool(self.pictures),
            "fields": fields,
            "policies": policies,
            "calibrations": [_told(name, one) for name, one in self.calibrations.items()],
        }


def open_indexes(settings: Settings, bundle: str) -> dict[str, Served]:
    """All indexes of the settings, by name.

    Raises:
        UserError: one that cannot be opened or is of another bundle, two of one name, a calibration of another index,
            thumbnails of an index that there is not.
    """
    found: dict[str, Served] = {}
    for path in (Path(given).expanduser().resolve() for given in settings.indexes):
        if path.is_file():
            router = open_router(path, bundle)
            _put(found, Served(path.stem, router.indexes, router))
        else:
            _put(found, Served(path.name, {ALONE: open_index(path, bundle)}))
    for collection in settings.collections:
        from medclip_lab.retrieval.milvus import open_collection

        _put(found, Served(collection, {ALONE: open_collection(str(settings.uri), collection, bundle)}))
    for calibration in settings.calibrations:
        _calibrate(found, Path(calibration).expanduser())
    for given in settings.thumbnails:
        name, _, folder = given.partition("=")
        index, _, domain = name.partition("/")
        if index not in found or domain not in found[index].stores:
            known = ", ".join(f"{one.name}/{domain}".rstrip("/") for one in found.values() for domain in one.stores)
            raise UserError(f"serve: thumbnails for {name!r}, but the indexes are {known or 'none'}")
        found[index].pictures[domain] = open_pictures(Path(folder).expanduser())
    return found


def _put(found: dict[str, Served], served: Served) -> None:
    if served.name in found:
        raise UserError(f"serve: two indexes are called {served.name!r}: rename one")
    found[served.name] = served


def _calibrate(found: dict[str, Served], path: Path) -> None:
    """A calibration goes to the index it was made with, whose fingerprint it has, also where a router has that too."""
    calibration = read_calibration(path)
    own = [
        served
        for served in found.values()
        if calibration.vectors in {store.fingerprint() for store in served.stores.values()}
    ]
    if not own:
        known = ", ".join(found) or "none"
        raise UserError(f"calibration: {path} was made with none of the indexes ({known}): calibrate again with one")
    for served in own:
        if path.stem in served.calibrations:
            raise UserError(f"serve: two calibrations of {served.name} are called {path.stem!r}: rename one")
        served.calibrations[path.stem] = calibration


def _told(name: str, calibration: Calibration) -> dict[str, Any]:
    policy, asked = calibration.policy, calibration.asked
    return {
        "name": name,
        "risk": policy.risk,
        "alpha": policy.alpha,
        "signal": policy.signal,
        "k": policy.k,
        "queries": policy.queries,
        "where": list(asked["where"]),
        "modality": asked["modality"],
        "other_patients": bool(asked["other_patients"]),
        "holds_for": calibration.told(),
    }


def _hash(store: Store) -> str:
    files = store.manifest.get("files")
    if files is None:
        return digest(store.fingerprint())
    return digest({role: entry["sha256"] for role, entry in files.items()})
