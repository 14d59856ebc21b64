"""Verbs of retrieval: embeddings and their index."""

import argparse
from pathlib import Path
from typing import Any

from medclip_lab.cli.common import Verbs, add_max_bad, add_verb, say
from medclip_lab.cli.search import add_store, milvus_uri
from medclip_lab.errors import UserError


def add_embed(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "embed", "shards to embeddings", "embed bundle shards --split test --out embeddings", _run_embed
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default=None, help="one split only (default: all)")
    parser.add_argument("--modalities", default="image,text", help="what is embedded (default: image,text)")
    parser.add_argument(
        "--texts",
        choices=("report", "sentences", "sections"),
        default="report",
        help="rows of the text embeddings (default: report)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the files")
    parser.add_argument("--batch-size", type=int, default=64, help="studies that are embedded together (default: 64)")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode ahead of the model (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; under torchrun, the GPU of the rank")
    parser.add_argument("--include-text", action="store_true", help="keep the report text, private as it is")
    add_max_bad(parser)


def _run_embed(args: argparse.Namespace) -> None:
    import os

    import torch

    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.embed import embed
    from medclip_lab.retrieval.parts import EmbedConfig

    if args.workers < 0:
        raise UserError(f"--workers: 0 or more, got {args.workers}")
    config = EmbedConfig(
        modalities=_names(args.modalities),
        texts=args.texts,
        dtype=args.dtype,
        batch_size=args.batch_size,
        include_text=args.include_text,
    )
    device = args.device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    encoder = load(args.bundle, device)
    manifest = embed(encoder, args.shards, args.out, args.split, config, args.max_bad, args.workers)
    run = manifest["run"]
    told = ", ".join(f"{count} {name}s" for name, count in run["rows"].items()) or "nothing left to do"
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in run["seconds"].items())
    lines = [f"{args.out}: {told} on {run['device']}; {seconds}", run["unusable"]]
    say(args, manifest, "\n".join(line for line in lines if line))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_index(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "index",
        "embeddings to an index that reaches a recall within a memory",
        "index embeddings --modality image --target-recall 0.99 --max-memory 4GB --out index",
        _run_index,
    )
    parser.add_argument("embeddings", type=Path, nargs="*", help="one or more folders of one bundle")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modality", choices=("image", "text"), default=None, help="what is found (default: image)")
    parser.add_argument("--include-text", action="store_true", help="answer with report text too")
    goals = parser.add_argument_group("goals")
    goals.add_argument(
        "--target-recall", type=float, default=None, help="of the truly nearest, in every direction (default: 0.99)"
    )
    goals.add_argument("--at", type=int, default=None, help="how many nearest that means (default: 10)")
    goals.add_argument("--max-memory", default=None, help="of the build, as 4GB (default: 3/4 of the machine's)")
    goals.add_argument("--queries", default=None, help="what will ask: image,text (default: what is embedded)")
    goals.add_argument("--factory", default=None, help="a FAISS factory string of your own, tuned and measured too")
    goals.add_argument(
        "--dedup", action=argparse.BooleanOptionalAction, default=None, help="one vector for copies (default: of texts)"
    )
    goals.add_argument("--seed", type=int, default=None, help="which queries are held out (default: 0)")
    goals.add_argument(
        "--on-disk",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="lists stay on the disk, also while they are made (default: if nothing fits into the memory)",
    )
    goals.add_argument("--processes", type=int, default=None, help="that fill lists on the disk (default: one a core)")
    change = parser.add_argument_group("change an index").add_mutually_exclusive_group()
    change.add_argument("--add", type=Path, nargs="+", default=None, help="embeddings to add to the index --out")
    change.add_argument("--remove", type=Path, default=None, help="a file of study ids, a line each, to remove from it")
    add_store(parser)


GOALS = ("target_recall", "at", "max_memory", "queries", "factory", "dedup", "seed", "on_disk", "processes")


def _refuse_beside(what: str, given: dict[str, Any]) -> None:
    """
    Raises:
        UserError: options that `what` would ignore.
    """
    if given:
        name = next(iter(given)).replace("_", "-")
        raise UserError(f"index: --{name} means nothing beside {what}: leave it out")


def _run_index(args: argparse.Namespace) -> None:
    from medclip_lab.retrieval.build import build_index
    from medclip_lab.retrieval.choose import Goals
    from medclip_lab.retrieval.memory import parse_size
    from medclip_lab.retrieval.update import add_to_index, remove_from_index

    if (args.add or args.remove) and args.embeddings:
        raise UserError("index: --add and --remove change the index --out: name no other embeddings beside them")
    uri = milvus_uri(args)
    goals = {name: getattr(args, name) for name in GOALS if getattr(args, name) is not None}
    if args.add or args.remove:
        built_with = {"modality": args.modality, "include_text": args.include_text}
        _refuse_beside("--add and --remove", goals | {name: given for name, given in built_with.items() if given})
    if uri is not None:
        _refuse_beside("--store milvus, which searches exactly", goals)
        manifest = _in_milvus(args, uri)
        say(args, manifest, f"{args.out}: {manifest['size']} {manifest['modality']} rows in Milvus, searched exactly")
        return
    if args.add:
        manifest = add_to_index(args.out, args.add)
    elif args.remove:
        manifest = remove_from_index(args.out, _lines(args.remove))
    else:
        if args.max_memory is not None:
            goals["max_memory"] = parse_size(args.max_memory)
        if args.queries is not None:
            goals["queries"] = _names(args.queries)
        manifest = build_index(args.embeddings, args.out, args.modality or "image", args.include_text, Goals(**goals))
    say(args, manifest, _told(args.out, manifest))


def _in_milvus(args: argparse.Namespace, uri: str) -> dict[str, Any]:
    from medclip_lab.retrieval.milvus import build_collection, open_collection

    if args.remove:
        raise UserError("index: --remove is for a FAISS index; delete rows of a collection with Milvus's own tools")
    if args.add:
        return open_collection(uri, str(args.out)).add(args.add)
    return build_collection(args.embeddings, uri, str(args.out), args.modality or "image", args.include_text)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--remove: cannot read {path}: {error}") from None


def _told(out: Path, manifest: dict[str, Any]) -> str:
    from medclip_lab.retrieval.memory import show_size

    recall = ", ".join(
        f"recall@{found['at']} of {name} queries {found.get('held_out', found['confirmed']):.4f}"
        for name, found in manifest["recall"].items()
    )
    memory = manifest["memory"]
    lines = [
        f"{out}: {manifest['size']} {manifest['modality']} rows, {manifest['factory']}; {recall}",
        f"memory at the peak {show_size(memory['peak'])}, predicted {show_size(memory['predicted'])}",
    ]
    changed = manifest["changed"]
    if manifest["withdrawn"]["studies"]:
        lines.append(f"{len(manifest['withdrawn']['studies'])} removed studies stay out of it")
    if any(changed.values()):
        lines[1] = f"since it was built {changed['added']} rows were added and {changed['removed']} removed"
    if manifest.get("rebuild"):
        lines.append("its recall was measured before: build it anew from all its embeddings")
    return "\n".join(lines)
