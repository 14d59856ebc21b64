"""Studies that were removed from an index: they stay out of it when it is built anew from embeddings that hold them.

The manifest keeps them as keyed hashes, enough to know a study again and no list of names: once an index was built
anew, nothing else in its folder is of them.
"""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_lab.errors import UserError


class Withdrawn:
    """The removed studies of an index, by its manifest; {} is that of none yet."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        noted = manifest.get("withdrawn") or {"key": secrets.token_hex(16), "studies": []}
        self._key, self._studies = bytes.fromhex(noted["key"]), frozenset(noted["studies"])

    def __len__(self) -> int:
        return len(self._studies)

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {"key": self._key.hex(), "studies": sorted(self._studies)}

    def and_also(self, studies: Collection[str]) -> "Withdrawn":
        return self._with(self._studies | self._hashes(studies))

    def without(self, studies: Collection[str]) -> "Withdrawn":
        """Those that come back are removed no longer."""
        return self._with(self._studies - self._hashes(studies))

    def stays(self, studies: Sequence[str]) -> NDArray[np.bool_]:
        """[len(studies)] whether a row of this study may be in the index."""
        gone = {study for study in set(studies) if self._hash(study) in self._studies} if self._studies else set()
        return np.array([study not in gone for study in studies], np.bool_)

    def _with(self, hashes: frozenset[str]) -> "Withdrawn":
        return Withdrawn({"withdrawn": {"key": self._key.hex(), "studies": hashes}})

    def _hashes(self, studies: Collection[str]) -> frozenset[str]:
        return frozenset(self._hash(study) for study in studies)

    def _hash(self, study: str) -> str:
        return hashlib.blake2b(study.encode(), key=self._key, digest_size=16).hexdigest()


def withdrawn_from(manifest: dict[str, Any], folder: object) -> Withdrawn:
    """The removed studies of an index that is about to be built anew.

    Raises:
        UserError: rows were removed before manifests named their studies.
    """
    if "removed" in manifest.get("files", ()) and "withdrawn" not in manifest:
        raise UserError(
            f"index: {folder} does not say which studies were removed from it: build in another folder, and remove "
            "them there"
        )
    return Withdrawn(manifest)
