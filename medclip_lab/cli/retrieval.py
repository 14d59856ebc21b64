"""Verbs of retrieval: embeddings, index, search."""

import argparse
from pathlib import Path

from medclip_lab.cli.common import Verbs, add_max_bad, add_verb, say


def add_embed(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "embed", "shards to embeddings", "embed bundle shards --split test --out embeddings", _run_embed
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default=None, help="one split only (default: all)")
    parser.add_argument("--include-text", action="store_true", help="keep the report text, private as it is")
    add_max_bad(parser)


def _run_embed(args: argparse.Namespace) -> None:
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.embed import embed

    manifest = embed(load(args.bundle), args.shards, args.out, args.split, args.include_text, args.max_bad)
    rows = {name: sum(files[name]["rows"] for files in manifest["files"].values()) for name in ("image", "text")}
    say(args, manifest, f"{args.out}: {rows['image']} images, {rows['text']} reports")


def add_index(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "index", "embeddings to an index", "index embeddings --modality image --out index", _run_index
    )
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modality", choices=("image", "text"), default="image", help="what is found (default: image)")
    parser.add_argument("--include-text", action="store_true", help="answer with report text too")


def _run_index(args: argparse.Namespace) -> None:
    from medclip_lab.retrieval.index import build_index

    manifest = build_index(args.embeddings, args.out, args.modality, args.include_text)
    recall = ", ".join(f"{name} queries {value:.3f}" for name, value in manifest["recall_at_10"].items())
    say(args, manifest, f"{args.out}: {manifest['size']} {args.modality} vectors; recall@10 of {recall}")


def add_search(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "search",
        "the studies of an index that are nearest to a text or an image",
        'search bundle index --text "left pleural effusion" -k 5',
        _run_search,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("index", type=Path)
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text")
    query.add_argument("--image", type=Path)
    parser.add_argument("-k", type=int, default=10, help="number of answers (default: 10)")


def _run_search(args: argparse.Namespace) -> None:
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.index import open_index

    encoder = load(args.bundle)
    index = open_index(args.index, bundle_fingerprint=encoder.fingerprint)
    query = encoder.encode_texts([args.text]) if args.text is not None else encoder.encode_images([args.image])
    hits = index.search(query, args.k)[0]
    lines = [f"{'rank':>4}  {'cosine':>6}  study"]
    for hit in hits:
        text = f"  {hit.row['text']}" if hit.row.get("text") else ""
        number = f" image {hit.row['image']}" if hit.row.get("image") else ""
        lines.append(f"{hit.rank:>4}  {hit.score:>6.3f}  {hit.study_id}{number}{text}")
    values = [{"rank": hit.rank, "score": hit.score, **hit.row} for hit in hits]
    say(args, values, "\n".join(lines))
