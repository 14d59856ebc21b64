"""What every verb has: help with an example, `--json`, `--debug`."""

import argparse
import json
from pathlib import Path
from typing import Any

Verbs = Any  # argparse has no public name for what add_subparsers returns
LABELSET = "chexpert14"


def add_verb(verbs: Verbs, name: str, help_text: str, example: str, run: Any) -> argparse.ArgumentParser:
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


def say(args: argparse.Namespace, value: Any, text: str) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str) if args.json else text)


def add_max_bad(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad", type=float, default=0.01, help="share of unusable studies that stops it (default: 0.01)"
    )


def add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labelset", default=LABELSET, help=f"shipped name or YAML file (default: {LABELSET})")
    parser.add_argument(
        "--score",
        default=None,
        help="mean_embedding, mean_similarity, max_similarity, pair_softmax or sigmoid (default: what fits the model)",
    )
    parser.add_argument("--temperature", type=float, default=None, help="of pair_softmax (default: the model's own)")
    parser.add_argument("--truncate", action="store_true", help="cut prompts that are longer than the context")


def add_labels_from(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels-from",
        default="labels",
        metavar="FIELD_OR_TABLE",
        help="where labels are told: a field of the records (finding_labels, votes ...), or a .csv whose first column "
        "is study_id (default: labels)",
    )


def add_ensemble(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ensemble", type=Path, nargs="+", default=[], help="further bundles to average with")
    parser.add_argument(
        "--average", choices=("scores", "logits"), default=None, help="what an ensemble averages (default: scores)"
    )
