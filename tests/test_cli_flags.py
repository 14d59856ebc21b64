"""The verbs and their flags, which scripts of others rely on: a change here is a change for them."""

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from medclip_lab.cli import build_parser, data

COMMON = {"--help", "--json", "--debug"}
STORE = {"--store", "--uri"}
POLICY = {"--policy", "--ratio", "--calibration"}
ASKING = COMMON | STORE | {"index", "embeddings", "--out", "-k", "--labels", "--same-patient", "--where"}
PREPARE = COMMON | {"--out", "--samples-per-shard", "--max-bad", "--workers", "--executor", "--duplicates"}
ROWS = {
    *("--image", "--image-folder", "--labels", "--license", "--modality", "--no-label-text", "--patient", "--split"),
    *("--study", "--text", "--view"),
}
SCORING = {"--labelset", "--score", "--temperature", "--truncate"}
ENSEMBLE = {"--ensemble", "--average"}
FLAGS = {
    "demo": COMMON | {"--out", "--seed", "--studies"},
    "prepare phantom": PREPARE | {"--studies", "--seed", "--size"},
    "prepare nih-cxr14": PREPARE | {"folder"},
    "prepare openi": PREPARE | {"path"},
    "prepare csv": PREPARE | ROWS | {"path"},
    "prepare biomedica": PREPARE | {"folder"},
    "prepare chexpert": PREPARE | {"--train-table", "folder"},
    "prepare chexpert-plus": PREPARE | {"--images", "--labels", "folder"},
    "prepare ct-rate": PREPARE | {"--volumes", "folder"},
    "prepare dicom-folder": PREPARE | {"--key-file", "--license", "--modalities", "folder"},
    "prepare hf-dataset": PREPARE | ROWS | {"folder"},
    "prepare jsonl": PREPARE | ROWS | {"folder"},
    "prepare mimic-cxr": PREPARE | {"--label-table", "--labeller", "--reports", "folder"},
    "prepare open-pmc": PREPARE | {"folder"},
    "prepare padchest": PREPARE | {"folder"},
    "prepare parquet": PREPARE | ROWS | {"folder"},
    "prepare pmc-oa": PREPARE | {"folder"},
    "prepare rocov2": PREPARE | {"folder"},
    "prepare rsna-pneumonia": PREPARE | {"folder"},
    "prepare siim-acr": PREPARE | {"folder"},
    "prepare vindr-cxr": PREPARE | {"folder"},
    "shards plan": COMMON
    | {
        "--samples",
        "--shards",
        "--split",
        "--samples-per-shard",
        "--sample-kib",
        "--ranks",
        "--batch-size",
        "--lanes",
        "--window",
        "--seed",
    },
    "shards check": COMMON | {"shards", "--no-decode", "--out"},
    "shards leaks": COMMON | {"train", "test", "--train-split", "--test-split", "--out", "--max-bad"},
    "shards repair": COMMON | {"shards", "--no-decode", "--out"},
    "train": COMMON | {"--config", "--out", "--profile", "--replay", "--resume", "--settings"},
    "evaluate": COMMON
    | {
        "bundle",
        "shards",
        "--split",
        "--labels-from",
        "--batch-zscore",
        "--no-calibration",
        "--compare",
        "--collapse-texts",
        "--draws",
        "--seed",
        "--blur",
        "--shuffle-labels",
        "--out",
        "--max-bad",
        "--protocol",
        "--list",
        "--subgroups",
        "--probe",
        "--corruptions",
        "--baseline",
        "--against",
        "--pointing",
        "--page",
        "--show-images",
    }
    | SCORING
    | ENSEMBLE,
    "explain": COMMON | {"bundle", "image", "prompt", "--against", "--method", "--stage", "--out"},
    "export": COMMON | {"run_folder", "--out", "--labelset", "--to", "--truncate", "--precision", "--image-size"},
    "card": COMMON | {"bundle", "--facts", "--evaluation"},
    "calibrate": COMMON
    | SCORING
    | ENSEMBLE
    | {"bundle", "shards", "--split", "--labels-from", "--method", "--threshold", "--false-alarm", "--max-bad"},
    "embed": COMMON
    | {"bundle", "shards", "--out", "--split", "--include-text", "--max-bad"}
    | {"--modalities", "--texts", "--dtype", "--batch-size", "--workers", "--device"},
    "index": COMMON
    | {"embeddings", "--out", "--modality", "--include-text", "--add", "--remove"}
    | {
        "--target-recall",
        "--at",
        "--max-memory",
        "--queries",
        "--factory",
        "--no-dedup",
        "--seed",
        "--no-on-disk",
        "--processes",
    }
    | STORE,
    "search": COMMON
    | {"bundle", "index", "--text", "--image", "--vector", "--id", "-k", "--where", "--not-patient", "--other-patients"}
    | {"--with-text", "--with-vectors", "--domain", "--nprobe", "--ef-search", "--k-factor"}
    | POLICY
    | STORE,
    "rag calibrate": ASKING | {"--risk", "--alpha", "--signal"},
    "rag export": ASKING | POLICY,
    "rag route": COMMON | {"--domain", "--out"},
    "classify": COMMON | SCORING | ENSEMBLE | {"bundle", "images", "--onnx"},
    "bench": COMMON
    | {
        "what",
        "--batch",
        "--dim",
        "--device",
        "--repeats",
        "--only",
        "--demo",
        "--shards",
        "--make",
        "--size",
        "--samples",
        "--out",
        "--bundle",
        "--seconds",
        "--minutes",
        "--gap",
        "--queries",
        "--target-recall",
        "--max-memory",
        "--case",
        "--seeds",
        "--embeddings",
    },
    "serve": COMMON
    | {"bundle", "--index", "--labelset", "--host", "--port", "--workers", "--keys", "--new-key", "--local-scopes"}
    | {"--collection", "--uri", "--calibration", "--thumbnails"}
    | {"--oidc-issuer", "--oidc-audience", "--oidc-jwks", "--oidc-scope-claim"}
    | {"--audit", "--dicomweb", "--max-body-mib", "--max-pixels", "--max-images", "--max-waiting", "--deadline"}
    | {"--max-batch", "--max-delay-ms", "--decode-threads", "--device", "--precision", "--compile", "--onnx"},
    "doctor": COMMON,
}


def verbs(parser: argparse.ArgumentParser, prefix: str = "") -> dict[str, argparse.ArgumentParser]:
    """Name to parser of every verb, those of sources included."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                below = verbs(inner, f"{prefix}{name} ")
                found |= below or {f"{prefix}{name}": inner}
    return found


def test_verbs_and_flags_are_frozen() -> None:
    """A new flag is a promise: it is added here on purpose."""
    found = {
        name: {(action.option_strings or [action.dest])[-1] for action in parser._actions}
        for name, parser in verbs(build_parser()).items()
    }
    assert found == FLAGS


@dataclass(frozen=True)
class Options:
    """A source to be."""

    folder: Path = field(metadata={"help": "where 100 % of it lies"})
    size: int = 8
    rate: float = 0.5
    table: Path | None = None
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "which", "example": "b"})
    columns: tuple[str, ...] = ("x",)
    with_text: bool = False


def test_fields_of_a_source_become_its_arguments() -> None:
    parser = argparse.ArgumentParser()
    data._add_source(parser.add_subparsers(), "toy", Options)
    args = parser.parse_args(["toy", "here", "--out", "o"])
    options = {option.name: getattr(args, option.name) for option in fields(Options)}
    assert Options(**options) == Options(Path("here"))
    args = parser.parse_args(
        [
            "toy",
            "here",
            "--out",
            "o",
            "--size",
            "9",
            "--rate",
            "1",
            "--table",
            "t",
            "--kind",
            "b",
            "--columns",
            "y",
            "z",
            "--with-text",
            "--workers",
            "2",
        ]
    )
    options = {option.name: getattr(args, option.name) for option in fields(Options)}
    assert options == {
        "folder": Path("here"), "size": 9, "rate": 1.0, "table": Path("t"), "kind": "b", "columns": ["y", "z"],
        "with_text": True,
    }  # fmt: skip
    with pytest.raises(SystemExit):
        parser.parse_args(["toy", "here", "--out", "o", "--kind", "c"])
    (toy,) = verbs(parser).values()
    assert "where 100 % of it lies" in toy.format_help()
    assert toy.format_help().endswith("medclip-lab prepare toy path/to/toy --kind b --out shards/toy\n")


def test_every_verb_has_an_example_that_parses() -> None:
    for name, parser in verbs(build_parser()).items():
        assert parser.epilog, name
        command = parser.epilog.splitlines()[-1].strip()
        assert command.startswith(f"medclip-lab {name}"), name
        import shlex

        build_parser().parse_known_args(shlex.split(command)[1:])
