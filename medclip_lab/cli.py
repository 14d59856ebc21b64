"""The command line: `medclip-lab VERB`. A user's mistake is one line and exit code 2; `--debug` shows the traceback."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medclip_lab import __version__
from medclip_lab.errors import UserError

Verbs = Any  # argparse has no public name for what add_subparsers returns


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if args.verb == "train":
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.command = shlex.join(["medclip-lab", *arguments])
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        if args.debug:
            raise
        print(f"medclip-lab {args.verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if args.debug:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"medclip-lab {args.verb}: {error.strerror or type(error).__name__}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nmedclip-lab {args.verb}: interrupted; nothing is half-written, call it again", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="medclip-lab",
        description="Contrastive pretraining for medical images and reports: from shards to a model that searches and "
        "classifies.",
    )
    parser.add_argument("--version", action="version", version=f"medclip_lab {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _demo(verbs)
    _prepare(verbs)
    _train(verbs)
    _evaluate(verbs)
    _export(verbs)
    _embed(verbs)
    _index(verbs)
    _search(verbs)
    _classify(verbs)
    _bench(verbs)
    _doctor(verbs)
    return parser


def _verb(verbs: Verbs, name: str, help_text: str, example: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=f"example:\n  medclip-lab {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    parser.set_defaults(run=run)
    return parser


def _say(args: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str) if args.json else text)


# --- demo ------------------------------------------------------------------------------------------------------------


def _demo(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "demo",
        "the main job on drawn phantoms: shards, training, evaluation, bundle, index, and a page to look at",
        "demo --out demo",
        _run_demo,
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other patients (default: 0)")
    parser.add_argument("--studies", type=int, default=None, help="number of studies (default: 2400)")


def _run_demo(args: argparse.Namespace) -> None:
    from medclip_lab.demo import demo

    result = demo(args.out, seed=args.seed, studies=args.studies, command=args.command)
    _say(args, result, result["summary"])


# --- prepare ---------------------------------------------------------------------------------------------------------


def _prepare(verbs: Verbs) -> None:
    parser = verbs.add_parser("prepare", help="source files to shards", description="Source files to shards.")
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)

    def source(name: str, help_text: str, example: str) -> argparse.ArgumentParser:
        added = _verb(sources, name, help_text, f"prepare {example}", _run_prepare)
        added.epilog = f"example:\n  medclip-lab prepare {example}"
        added.add_argument("--out", type=Path, required=True, help="folder for the shards")
        added.add_argument("--samples-per-shard", type=int, default=256, help="studies in a shard (default: 256)")
        _max_bad(added)
        return added

    phantom = source("phantom", "synthetic chest radiographs with reports", "phantom --studies 1000 --out shards")
    phantom.add_argument("--studies", type=int, default=1000, help="number of studies (default: 1000)")
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--size", type=int, default=128, help="side of the images in pixels (default: 128)")

    nih = source("nih-cxr14", "NIH ChestX-ray14 in its original layout", "nih-cxr14 path/to/CXR8 --out shards/nih")
    nih.add_argument("folder", type=Path, help="folder with Data_Entry_2017*.csv and the images")

    openi = source("openi", "Open-i (Indiana University) reports", "openi NLMCXR_reports.tgz --out shards/openi")
    openi.add_argument("path", type=Path, help="NLMCXR_reports.tgz, or the folder with its XML files")

    table = source(
        "csv", "a table of your own images and texts", "csv studies.csv --image image --text report --out shards"
    )
    table.add_argument("path", type=Path, help=".csv or .tsv with a header line")
    table.add_argument("--image", default="image", help="column of image paths (default: image)")
    table.add_argument("--text", default="text", help="column of reports (default: text)")
    table.add_argument(
        "--study", default=None, help="column of study ids, its rows being one study (default: study_id, if there)"
    )
    table.add_argument("--patient", default=None, help="column of patient ids (default: patient_id, if there)")
    table.add_argument(
        "--split", default=None, help="column of train/val/test (default: split, if there, else 80/10/10)"
    )
    table.add_argument("--labels", nargs="+", default=None, help="label columns (default: CheXpert's names)")
    table.add_argument("--image-folder", type=Path, default=None, help="where relative image paths start")
    table.add_argument("--license", default="private", help="noted in every study (default: private)")


def _run_prepare(args: argparse.Namespace) -> None:
    from medclip_lab.data.prepare import prepare

    quiet = ("run", "command", "debug", "json", "verb", "source", "out", "samples_per_shard", "max_bad")
    options = {name: value for name, value in vars(args).items() if name not in quiet}
    manifest, summary = prepare(args.source, args.out, args.samples_per_shard, args.max_bad, args.command, **options)
    _say(args, manifest, summary)


# --- train, export, evaluate -----------------------------------------------------------------------------------------


def _train(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "train",
        "train from a config; called again, an interrupted run goes on",
        "train --config configs/phantom.yaml --out runs/phantom --optim.lr=5e-4 --trainer.epochs=5",
        _run_train,
    )
    parser.usage = "medclip-lab train --config FILE [--out DIR] [--settings] [--SECTION.NAME=VALUE ...]"
    parser.add_argument("--config", type=Path, help="a YAML file, or the name of a shipped one")
    parser.add_argument("--out", default=None, help="folder of the run")
    parser.add_argument("--settings", action="store_true", help="list every setting with its default, and stop")


def _run_train(args: argparse.Namespace) -> None:
    from medclip_lab import config as configs
    from medclip_lab.distributed import launched_world
    from medclip_lab.training.run import RunConfig, diary, train

    if args.settings:
        configs.parser(RunConfig).print_help()
        return
    if args.config is None:
        raise UserError("--config is missing: a YAML file, or the name of a shipped one (phantom, nih_openi_semantic)")
    path = args.config
    if not path.exists() and configs.shipped(f"{path}.yaml").exists():
        path = configs.shipped(f"{path}.yaml")
    overrides = [*args.overrides, f"--out={args.out}"] if args.out else args.overrides
    run = train(configs.load_config(RunConfig, path, overrides))
    if launched_world()[0] > 0:
        return  # one rank speaks
    last = [line for line in diary(run) if "loss" in line][-1]
    _say(args, {"run": str(run), **last}, f"{run}: step {last['step']}, loss {last['loss']:.4f}")


def _export(verbs: Verbs) -> None:
    parser = _verb(verbs, "export", "a finished run to a bundle", "export runs/phantom --out bundle", _run_export)
    parser.add_argument("run_folder", metavar="run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--labelset", nargs="*", default=["chexpert14"], help="label sets to carry")


def _run_export(args: argparse.Namespace) -> None:
    from medclip_lab.training.export import export

    manifest = export(args.run_folder, args.out, args.labelset, args.command)
    _say(args, manifest, f"{args.out}: bundle {manifest['fingerprint'][:12]}, {len(manifest['files'])} files")


def _evaluate(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "evaluate",
        "zero-shot AUROC with intervals and retrieval, on held-out studies",
        "evaluate bundle shards --split test",
        _run_evaluate,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--labelset", default="chexpert14", help="shipped name or YAML file (default: chexpert14)")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws, by patient (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blur", type=float, default=0.0, help="control: blur images by this share of their side")
    parser.add_argument("--shuffle-labels", action="store_true", help="control: shuffle labels between studies")
    parser.add_argument("--out", type=Path, default=None, help="write the results as JSON too")
    _max_bad(parser)


def _max_bad(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad", type=float, default=0.01, help="share of unusable studies that stops it (default: 0.01)"
    )


def _run_evaluate(args: argparse.Namespace) -> None:
    from medclip_lab.evaluation.protocol import blur, evaluate, summary
    from medclip_lab.files import write_json
    from medclip_lab.inference.encoder import load

    if args.out and args.out.is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a JSON file")
    result = evaluate(
        load(args.bundle),
        args.shards,
        args.split,
        args.labelset,
        draws=args.draws,
        seed=args.seed,
        change=blur(args.blur) if args.blur else None,
        control=args.shuffle_labels,
        max_bad=args.max_bad,
    )
    if args.out:
        write_json(args.out, result | {"command": args.command})
    _say(args, result, summary(result))


# --- embed, index, search, classify ----------------------------------------------------------------------------------


def _embed(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "embed", "shards to embeddings", "embed bundle shards --split test --out embeddings", _run_embed
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default=None, help="one split only (default: all)")
    parser.add_argument("--include-text", action="store_true", help="keep the report text, private as it is")
    _max_bad(parser)


def _run_embed(args: argparse.Namespace) -> None:
    from medclip_lab.inference.encoder import load
    from medclip_lab.retrieval.embed import embed

    manifest = embed(load(args.bundle), args.shards, args.out, args.split, args.include_text, args.max_bad)
    rows = {name: sum(files[name]["rows"] for files in manifest["files"].values()) for name in ("image", "text")}
    _say(args, manifest, f"{args.out}: {rows['image']} images, {rows['text']} reports")


def _index(verbs: Verbs) -> None:
    parser = _verb(
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
    _say(args, manifest, f"{args.out}: {manifest['size']} {args.modality} vectors; recall@10 of {recall}")


def _search(verbs: Verbs) -> None:
    parser = _verb(
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
    _say(args, values, "\n".join(lines))


def _classify(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "classify",
        "zero-shot scores of images, without any training on labels",
        "classify bundle chest.png",
        _run_classify,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--labelset", default="chexpert14", help="shipped name or YAML file (default: chexpert14)")


def _run_classify(args: argparse.Namespace) -> None:
    from medclip_lab.inference.encoder import load

    rows = load(args.bundle).zero_shot_classifier(args.labelset).predict(args.images)
    lines = []
    for image, row in zip(args.images, rows, strict=True):
        lines.append(f"{image}")
        for name, value in sorted(row.items(), key=lambda item: -item[1]["score"]):
            lines.append(f"  {value['score']:.3f}  {'#' * round(20 * value['score']):<20}  {name}")
    lines.append("scores order images; they are not probabilities (the bundle is not calibrated)")
    _say(args, [{"image": str(i), "labels": r} for i, r in zip(args.images, rows, strict=True)], "\n".join(lines))


# --- doctor ----------------------------------------------------------------------------------------------------------


def _bench(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "bench",
        "speed and memory beside named peers, on this machine",
        "bench losses --batch 8192 --dim 768 --out benchmarks/losses.json",
        _run_bench,
    )
    parser.add_argument("what", choices=["losses"], help="losses: forward and backward beside open_clip's")
    parser.add_argument("--batch", type=int, default=None, help="rows of features (default: 8192; on a GPU several)")
    parser.add_argument("--dim", type=int, default=None, help="embed dim (default: 768; on a GPU several)")
    parser.add_argument("--device", default="cpu", help="cpu: float32; cuda: bfloat16 and the fused kernels")
    parser.add_argument("--repeats", type=int, default=None, help="timed repetitions of each (default: 5; on a GPU 30)")
    parser.add_argument("--only", nargs="+", default=None, help="names of losses (default: all)")
    parser.add_argument("--out", type=Path, default=None, help="file for the JSON; a drawing or a table goes beside it")


def _run_bench(args: argparse.Namespace) -> None:
    from medclip_lab import bench
    from medclip_lab.files import write_json

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if args.device == "cuda":
        _bench_on_gpu(args, say)
        return
    result = bench.bench_losses(
        args.batch or 8192, args.dim or 768, args.device, args.repeats or 5, args.only, say
    )  # fmt: skip
    result = {"command": args.command, **result}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        bench.draw_losses(result, args.out.with_suffix(".svg"))
    _say(args, result, "" if args.out is None else f"{args.out}\n{args.out.with_suffix('.svg')}")


def _bench_on_gpu(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    from medclip_lab import gpu_bench
    from medclip_lab.files import atomic_file, write_json

    sizes = gpu_bench.Sizes.of(args.batch, args.dim, args.repeats, args.only or ())
    result: dict[str, Any] = {"command": args.command}
    result |= gpu_bench.measure(args.device, "fused", sizes, say, ("matrix_rate", "speed", "memory"))
    table = gpu_bench.markdown(result)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        with atomic_file(args.out.with_suffix(".md")) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    _say(args, result, table)


def _doctor(verbs: Verbs) -> None:
    _verb(verbs, "doctor", "versions, devices and what does not fit together", "doctor", _run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from medclip_lab.doctor import examine

    facts = examine(Path.cwd())
    lines = [f"{name:<18}{value}" for name, value in facts.items() if not isinstance(value, dict | list)]
    lines += [f"{name:<18}{value or 'not installed'}" for name, value in facts["versions"].items()]
    cuda = facts["torch"].get("cuda")
    devices = ", ".join(device["name"] for device in facts["torch"].get("devices", [])) or "CPU only"
    lines += [f"{'devices':<18}{devices} (torch built for {'CUDA ' + cuda if cuda else 'CPU'})"]
    lines += [f"{'faiss':<18}{', '.join(f'{n} {v}' for n, v in facts['faiss'].items()) or 'none'}"]
    lines += [f"problem: {problem}" for problem in facts["problems"]] or ["no problem found"]
    _say(args, facts, "\n".join(lines))
    return 1 if facts["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
