"""The command line: `medclip-lab VERB`. A user's mistake is one line and exit code 2; `--debug` shows the traceback."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from medclip_lab import __version__
from medclip_lab.cli import data, evaluate, measure, model, retrieval, search, serve, shards
from medclip_lab.errors import StartAgainError, UserError


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
    except StartAgainError as cut:
        if args.debug:
            raise
        print(f"medclip-lab {args.verb}: {cut}", file=sys.stderr)
        return 75
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
    model.add_demo(verbs)
    data.add_prepare(verbs)
    shards.add_shards(verbs)
    model.add_train(verbs)
    evaluate.add_evaluate(verbs)
    evaluate.add_explain(verbs)
    evaluate.add_calibrate(verbs)
    model.add_export(verbs)
    model.add_card(verbs)
    retrieval.add_embed(verbs)
    retrieval.add_index(verbs)
    search.add_search(verbs)
    search.add_rag(verbs)
    model.add_classify(verbs)
    serve.add_serve(verbs)
    measure.add_bench(verbs)
    measure.add_doctor(verbs)
    return parser
