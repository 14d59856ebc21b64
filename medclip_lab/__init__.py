"""Contrastive pretraining for medical images and reports: shards in, a searchable and classifying model out.

Importing this package defines names and nothing else; torch, lightning and faiss are imported when they are used.
"""

from typing import TYPE_CHECKING

from medclip_lab.version import __version__

if TYPE_CHECKING:
    import os

    from medclip_lab.inference.encoder import Encoder
    from medclip_lab.retrieval.index import Index

__all__ = ["__version__", "load", "open_index"]


def load(bundle: "str | os.PathLike[str]", device: str = "auto") -> "Encoder":
    """Open an exported bundle, offline: see `medclip_lab.inference.encoder.load`."""
    from medclip_lab.inference.encoder import load as load_bundle

    return load_bundle(bundle, device=device)


def open_index(folder: "str | os.PathLike[str]", bundle_fingerprint: str | None = None) -> "Index":
    """Open an index folder for search: see `medclip_lab.retrieval.index.open_index`."""
    from medclip_lab.retrieval.index import open_index as open_folder

    return open_folder(folder, bundle_fingerprint=bundle_fingerprint)
