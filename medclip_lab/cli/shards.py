"""Verbs over shards that exist, or might: plan, check, repair."""

import argparse
import dataclasses
from pathlib import Path

from medclip_lab.cli.common import Verbs, add_max_bad, add_verb, say
from medclip_lab.errors import UserError


def add_shards(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "shards", help="plan, check, repair and compare shards", description="Plan, check, repair and compare shards."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_plan(actions)
    _add_check(actions)
    _add_repair(actions)
    _add_leaks(actions)


def _add_plan(actions: Verbs) -> None:
    plan = add_verb(
        actions,
        "plan",
        "what an order of samples costs and how well it mixes, before a run",
        "shards plan --samples 1000000000 --ranks 1024 --batch-size 32768 --lanes 1024",
        _run_plan,
    )
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--samples", type=int, help="how many there would be")
    size.add_argument("--shards", help="folder, URL or pattern: those that are there")
    plan.add_argument("--split", default="train", help="of --shards (default: train)")
    plan.add_argument("--samples-per-shard", type=int, default=1000, help="with --samples (default: 1000)")
    plan.add_argument("--sample-kib", type=float, default=100, help="with --samples: size of one (default: 100)")
    plan.add_argument("--ranks", type=int, default=1)
    plan.add_argument("--batch-size", type=int, default=256, help="of the global batch (default: 256)")
    plan.add_argument("--lanes", type=int, default=1, help="data.lanes (default: 1)")
    plan.add_argument("--window", type=int, default=10_000, help="data.shuffle_size (default: 10000)")
    plan.add_argument("--seed", type=int, default=0)


def _run_plan(args: argparse.Namespace) -> None:
    from medclip_lab.data.manifest import Manifest
    from medclip_lab.data.simulate import Case, simulate, table

    if not 0 < args.sample_kib < 2**40:
        raise UserError(f"plan: --sample-kib must be positive, got {args.sample_kib}")
    samples, per_shard, size = args.samples, args.samples_per_shard, max(1, round(args.sample_kib * 1024))
    if args.shards is not None:
        shards = Manifest.load(args.shards).of_split(args.split)
        samples = sum(shard.samples for shard in shards)
        per_shard = max(1, round(samples / len(shards)))
        size = max(1, sum(shard.bytes for shard in shards) // max(samples, 1))
    try:
        case = Case(samples, per_shard, args.ranks, args.batch_size, args.lanes, args.window, size, args.seed)
        figures = simulate(case)
    except ValueError as error:
        raise UserError(f"plan: {error}") from None
    say(args, dataclasses.asdict(case) | figures, table(case, figures))


def _add_check(actions: Verbs) -> None:
    check = add_verb(
        actions,
        "check",
        "is every shard the one that was written, and every sample readable? Exit code 1 if not",
        "shards check shards/nih --out bad.jsonl",
        _run_check,
    )
    check.add_argument("shards", help="folder, URL or pattern")
    check.add_argument("--no-decode", action="store_true", help="do not decode the images")
    check.add_argument("--out", type=Path, default=None, help="list what is bad in this JSONL file")


def _run_check(args: argparse.Namespace) -> int:
    from medclip_lab.data.check import check, summary

    result = check(args.shards, decode=not args.no_decode, listed=args.out)
    say(args, result, summary(result))
    return 1 if result["bad"] else 0


def _add_repair(actions: Verbs) -> None:
    repair = add_verb(
        actions,
        "repair",
        "write shards anew without what is bad in them",
        "shards repair shards/nih --out shards/nih-whole",
        _run_repair,
    )
    repair.add_argument("shards", help="folder, URL or pattern; it stays as it is")
    repair.add_argument("--out", type=Path, required=True, help="a new folder")
    repair.add_argument("--no-decode", action="store_true", help="do not decode the images")


def _run_repair(args: argparse.Namespace) -> None:
    from medclip_lab.data.repair import repair, summary

    manifest = repair(args.shards, args.out, decode=not args.no_decode, command=args.command)
    say(args, manifest, summary(args.out, manifest))


def _add_leaks(actions: Verbs) -> None:
    leaks = add_verb(
        actions,
        "leaks",
        "does the test set stand in the training data: patients, images, images that look alike? Exit code 1 if so",
        "shards leaks shards/train shards/other --out leaks.json",
        _run_leaks,
    )
    leaks.add_argument("train", help="folder, URL or pattern of what a model was trained on")
    leaks.add_argument("test", help="folder, URL or pattern of what it is tested on")
    leaks.add_argument("--train-split", default="train", help='or several: "train+val" (default: train)')
    leaks.add_argument("--test-split", default="test", help="(default: test)")
    leaks.add_argument("--out", type=Path, default=None, help="write the result, with the study ids, as JSON")
    add_max_bad(leaks)


def _run_leaks(args: argparse.Namespace) -> int:
    from medclip_lab.evaluation.leaks import leaks, summary
    from medclip_lab.files import write_json

    result = leaks(args.train, args.test, args.train_split, args.test_split, args.max_bad)
    if args.out:
        write_json(args.out, result | {"command": args.command})
    say(args, result, summary(result))
    return 1 if result["leaks"] else 0
