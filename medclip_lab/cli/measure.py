"""Verbs that look at the machine: speed beside named peers, and what is installed."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medclip_lab.cli.common import Verbs, add_verb, say
from medclip_lab.errors import UserError


def add_bench(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "bench",
        "speed and memory beside named peers, on this machine",
        "bench losses --batch 8192 --dim 768 --out benchmarks/losses.json",
        _run_bench,
    )
    parser.add_argument(
        "what",
        choices=["losses", "data", "resume", "train", "scale", "evaluate", "index", "serve", "precision"],
        help="losses: forward and backward beside open_clip's; data: training batches a second beside open_clip's; "
        "resume: going on in the middle of an epoch; train: samples a second beside a bare loop and open_clip's "
        "trainer; scale: a model of a step fitted here and taken to many GPUs; evaluate: building classifiers, "
        "full-gallery retrieval, intervals; index: recall, speed and memory beside plain faiss; serve: the service "
        "under load beside FastAPI and LitServe; precision: the image tower on the CPU in bfloat16, compiled, by ONNX "
        "Runtime and in int8, and what that costs in AUROC",
    )
    parser.add_argument(
        "--batch", type=int, default=None, help="rows of features (default: 8192; on a GPU several); data: samples (64)"
    )
    parser.add_argument("--repeats", type=int, default=None, help="timed repetitions of each (default: 5; on a GPU 30)")
    parser.add_argument(
        "--out", type=Path, default=None, help="file for the JSON; losses: a drawing or a table beside it"
    )
    losses = parser.add_argument_group("losses")
    losses.add_argument(
        "--dim", type=int, default=None, help="embed dim (default: 768; on a GPU several); evaluate: 512"
    )
    losses.add_argument("--device", default="cpu", help="cpu: float32; cuda: bfloat16 and the fused kernels")
    losses.add_argument(
        "--only",
        nargs="+",
        default=None,
        help="names of losses, of cases of train, or of parts of evaluate: bootstrap, retrieval, gallery, classifier, "
        "calibration, pointing (default: all)",
    )
    data = parser.add_argument_group("data, resume, train")
    data.add_argument("--shards", nargs="+", type=Path, default=[], help="folders of shards to read")
    data.add_argument("--make", nargs="+", default=[], help="sets to make and read: 1024-jpeg, 320-jpeg, 512-png16")
    data.add_argument("--size", type=int, default=224, help="side of the images in a batch (default: 224)")
    data.add_argument(
        "--samples",
        type=int,
        default=None,
        help="of each set, at most (default: 512); resume: in all (1,000,000); evaluate: of the gallery (20,000); "
        "index: vectors (100,000)",
    )
    index = parser.add_argument_group("index (--dim: 512 by default)")
    index.add_argument("--gap", type=float, default=1.0, help="how far images and texts lie apart (default: 1)")
    index.add_argument("--queries", type=int, default=500, help="of each direction (default: 500)")
    index.add_argument(
        "--target-recall", type=float, default=None, help="asked of ours (default: 0.95; exact: 1; targets: 0.99)"
    )
    index.add_argument(
        "--max-memory",
        default=None,
        help="given to ours, as 1GB (default: 3/4 of the machine's; million: 1GB; on-disk: 600MB)",
    )
    index.add_argument(
        "--case",
        choices=["compare", "exact", "million", "on-disk", "targets", "embed", "risk"],
        default="compare",
        help="compare: beside plain faiss and autofaiss; exact: 377,110 vectors beside faiss's exact kinds; million: "
        "1,000,000 in 1GB; on-disk: the same in 600MB; targets: recall of four corpora, --seeds of each; embed: "
        "embeddings beside the bare encoder; risk: the calibrated policy over --repeats splits (200)",
    )
    index.add_argument("--seeds", type=int, default=5, help="of targets (default: 5)")
    index.add_argument(
        "--embeddings", type=Path, default=None, help="folder that embed wrote, for risk (default: made vectors)"
    )
    evaluate = parser.add_argument_group("evaluate")
    evaluate.add_argument(
        "--demo", type=Path, default=None, help="folder of medclip-lab demo, for calibration and pointing"
    )
    serve = parser.add_argument_group("serve, precision (--shards: test images with labels)")
    serve.add_argument(
        "--bundle", type=Path, default=None, help="to serve, or to embed with (default: one of random weights)"
    )
    serve.add_argument("--seconds", type=float, default=10.0, help="of each load (default: 10)")
    serve.add_argument(
        "--minutes", type=float, default=None, help="of a mixed load on ours alone: memory and failures (default: none)"
    )


def _run_bench(args: argparse.Namespace) -> None:
    benches = {
        "losses": _bench_on_gpu if args.device == "cuda" else _bench_losses,
        "data": _bench_data,
        "resume": _bench_resume,
        "train": _bench_train,
        "scale": _bench_scale,
        "evaluate": _bench_evaluate,
        "index": _bench_index,
        "serve": _bench_serve,
        "precision": _bench_precision,
    }
    benches[args.what](args)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _bench_losses(args: argparse.Namespace) -> None:
    from medclip_lab.bench.losses import bench_losses, draw_losses

    result = bench_losses(args.batch or 8192, args.dim or 768, args.device, args.repeats or 5, args.only, _tell)
    _keep(args, result, draw=draw_losses)


def _bench_data(args: argparse.Namespace) -> None:
    from medclip_lab.bench.data import bench_data, table

    samples = 512 if args.samples is None else args.samples
    _keep(
        args,
        bench_data(args.shards, args.make, args.size, args.batch or 64, samples, args.repeats or 5, _tell),
        table,
    )


def _bench_resume(args: argparse.Namespace) -> None:
    from medclip_lab.bench.resume import bench_resume

    told = ("first_batch_seconds", "peak_mib", "lost", "repeated")
    samples = 1_000_000 if args.samples is None else args.samples
    result = bench_resume(samples, args.batch or 64, _tell)
    _keep(args, result, lambda result: "\n".join(f"{name:<22}{result[name]}" for name in told))


def _bench_train(args: argparse.Namespace) -> None:
    from medclip_lab.bench.train import bench_train, table

    shards = args.shards[0] if args.shards else None
    samples = 512 if args.samples is None else args.samples
    _keep(args, bench_train(args.only or (), shards, samples, args.repeats or 3, _tell), table)


def _bench_serve(args: argparse.Namespace) -> None:
    from medclip_lab.bench.serve import bench_serve, table

    _keep(args, bench_serve(args.bundle, args.only or (), args.seconds, args.repeats or 3, _tell, args.minutes), table)


def _bench_precision(args: argparse.Namespace) -> None:
    from medclip_lab.bench.precision import bench_precision, table

    shards = args.shards[0] if args.shards else None
    samples = 256 if args.samples is None else args.samples
    batch, repeats = args.batch or 16, args.repeats or 5
    _keep(args, bench_precision(args.bundle, shards, args.only or (), samples, batch, repeats, _tell), table)


def _bench_scale(args: argparse.Namespace) -> None:
    from medclip_lab.bench.scale import bench_scale, table

    _keep(args, bench_scale(_tell), table)


def _keep(
    args: argparse.Namespace,
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], str] | None = None,
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Write a result with its command, and a drawing of it, if a file is named; tell its table, or what was written."""
    from medclip_lab.files import write_json

    result = {"command": args.command, **result}
    written = []
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        written.append(str(args.out))
        if draw is not None:
            draw(result, args.out.with_suffix(".svg"))
            written.append(str(args.out.with_suffix(".svg")))
    say(args, result, table(result) if table else "\n".join(written))


def _bench_evaluate(args: argparse.Namespace) -> None:
    from medclip_lab.bench.evaluate import bench_evaluate, table

    samples = 20_000 if args.samples is None else args.samples
    _keep(args, bench_evaluate(samples, args.dim or 512, only=args.only, demo=args.demo, say=_tell), table)


def _bench_index(args: argparse.Namespace) -> None:
    from medclip_lab.bench.cases import bench_exact, bench_million, told
    from medclip_lab.bench.index import bench_index, draw_index
    from medclip_lab.bench.targets import bench_targets
    from medclip_lab.bench.vectors import Corpus
    from medclip_lab.retrieval.choose import Goals
    from medclip_lab.retrieval.memory import parse_size

    if args.only and args.case not in ("compare", "targets"):
        raise UserError(f"bench index: --case {args.case} is measured whole: leave --only out")
    if args.case == "embed":
        from medclip_lab.bench.embedding import bench_embed

        _keep(args, bench_embed(args.bundle, args.samples or 256, args.repeats or 5, _tell), told)
        return
    if args.case == "risk":
        from medclip_lab.bench import risk

        made = Corpus(size=args.samples or 20_000, dim=args.dim or 64, gap=args.gap)
        _keep(args, risk.bench_risk(args.embeddings or made, args.repeats or 200, _tell), risk.told)
        return
    size = {"exact": 377_110, "million": 1_000_000, "on-disk": 1_000_000}.get(args.case, 100_000)
    corpus = Corpus(size=size if args.samples is None else args.samples, dim=args.dim or 512, gap=args.gap)
    memory = args.max_memory or {"million": "1GB", "on-disk": "600MB"}.get(args.case)
    target = args.target_recall or {"exact": 1.0, "targets": 0.99}.get(args.case, 0.95)
    on_disk = True if args.case == "on-disk" else None
    goals = Goals(target, max_memory=None if memory is None else parse_size(memory), on_disk=on_disk)
    if args.case == "targets":
        _keep(args, bench_targets(corpus, goals, args.queries, args.seeds, args.only, _tell), told)
    elif args.case in ("exact", "million", "on-disk"):
        measure = bench_exact if args.case == "exact" else bench_million
        _keep(args, measure(corpus, goals, args.queries, _tell), told)
    else:
        _keep(args, bench_index(corpus, goals, args.queries, args.only, _tell), draw=draw_index)


def _bench_on_gpu(args: argparse.Namespace) -> None:
    from medclip_lab import gpu_bench
    from medclip_lab.files import atomic_file, write_json

    sizes = gpu_bench.Sizes.of(args.batch, args.dim, args.repeats, args.only or ())
    result: dict[str, Any] = {"command": args.command}
    result |= gpu_bench.measure(args.device, "fused", sizes, _tell, ("matrix_rate", "speed", "memory"))
    table = gpu_bench.markdown(result)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        with atomic_file(args.out.with_suffix(".md")) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    say(args, result, table)


def add_doctor(verbs: Verbs) -> None:
    add_verb(verbs, "doctor", "versions, devices and what does not fit together", "doctor", _run_doctor)


def _run_doctor(args: argparse.Namespace) -> int:
    from medclip_lab.doctor import examine

    facts = examine(Path.cwd())
    lines = [f"{name:<18}{value}" for name, value in facts.items() if not isinstance(value, dict | list)]
    lines += [f"{name:<18}{value or 'not installed'}" for name, value in facts["versions"].items()]
    cuda = facts["torch"].get("cuda")
    devices = ", ".join(device["name"] for device in facts["torch"].get("devices", [])) or "CPU only"
    lines += [f"{'devices':<18}{devices} (torch built for {'CUDA ' + cuda if cuda else 'CPU'})"]
    lines += [f"{'faiss':<18}{', '.join(f'{n} {v}' for n, v in facts['faiss'].items()) or 'none'}"]
    lines += [f"{'faiss that fits':<18}{facts['faiss_that_fits']}"]
    lines += [f"problem: {problem}" for problem in facts["problems"]] or ["no problem found"]
    say(args, facts, "\n".join(lines))
    return 1 if facts["problems"] else 0
