"""Embeddings that the tests of this room share."""

from pathlib import Path

import pytest

from medclip_lab.bench.vectors import Corpus
from medclip_lab.data.manifest import Manifest


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Two cones, 300 studies in a block, every fourth report a copy."""
    return Corpus(size=900, dim=24, clusters=20, repeated=0.25)


@pytest.fixture(scope="session")
def made(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.write(tmp_path_factory.mktemp("made") / "embeddings")


@pytest.fixture(scope="session")
def embeddings(toy_bundle: Path, toy_shards: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the toy test split, with text."""
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.embed import embed
    from medclip_lab.retrieval.parts import EmbedConfig

    out = tmp_path_factory.mktemp("embeddings") / "test"
    embed(load(toy_bundle, device="cpu"), toy_shards.folder, out, "test", EmbedConfig(include_text=True))
    return out


@pytest.fixture(scope="session")
def index(embeddings: Path) -> Path:
    from medclip_lab.retrieval.build import build_index

    build_index(embeddings, embeddings.parent / "index", "image", include_text=True)
    return embeddings.parent / "index"
