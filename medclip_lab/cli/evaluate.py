"""Verbs that measure a model and look into it: evaluate, calibrate, explain."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from medclip_lab.cli.common import (
    LABELSET,
    Verbs,
    add_ensemble,
    add_labels_from,
    add_max_bad,
    add_scoring,
    add_verb,
    say,
)
from medclip_lab.errors import UserError


def add_evaluate(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        "zero-shot metrics with intervals, paired tests and retrieval, on held-out studies",
        "evaluate bundle shards --subgroups sex age view --out results.json --page results.html",
        _run_evaluate,
    )
    parser.add_argument("bundle", nargs="?", help="a bundle, or local-dir:FOLDER, hf:FOLDER, open_clip:NAME@WEIGHTS")
    parser.add_argument("shards", nargs="?", type=Path)
    parser.add_argument("--split", default=None, help="(default: test)")
    add_scoring(parser)
    add_labels_from(parser)
    parser.set_defaults(labelset=None, labels_from=None)  # so that what is named beside a protocol is known
    add_ensemble(parser)
    parser.add_argument("--batch-zscore", action="store_true", help="z-score each label over the split (transductive)")
    parser.add_argument(
        "--no-calibration", action="store_true", help="scores alone, also on patients the calibration was made with"
    )
    parser.add_argument(
        "--collapse-texts", action="store_true", help="retrieval: equal reports are one item (default: all positives)"
    )
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws, by patient (default: 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blur", type=float, default=0.0, help="control: blur images by this share of their side")
    parser.add_argument("--shuffle-labels", action="store_true", help="control: shuffle labels between studies")
    parser.add_argument("--out", type=Path, default=None, help="write the results as JSON too, scores beside them")
    add_max_bad(parser)
    named = parser.add_argument_group("protocols")
    named.add_argument("--protocol", default=None, help="shipped name or YAML file; it names split, labels and rule")
    named.add_argument("--list", type=Path, default=None, help="with --protocol: a file of study ids, one a line")
    more = parser.add_argument_group("more figures")
    more.add_argument("--subgroups", nargs="+", default=[], metavar="COLUMN", help="sex, age, view or any column")
    more.add_argument(
        "--probe",
        nargs="+",
        default=[],
        metavar="KIND",
        help="linear, few (k-shot and shares), knn, prompts: fitted on split train, chosen on val",
    )
    more.add_argument("--corruptions", action="store_true", help="seven kinds in five severities")
    more.add_argument("--baseline", type=Path, default=None, help="with --corruptions: results of another, for mCE")
    more.add_argument("--against", default=None, help="shards of the training: does the test set leak?")
    more.add_argument("--pointing", action="store_true", help="where maps point, if the records tell regions")
    shown = parser.add_argument_group("the report")
    shown.add_argument("--page", type=Path, default=None, help="write one self-contained HTML page")
    shown.add_argument(
        "--show-images", action="store_true", help="with --page: best and worst cases; the page is then private"
    )
    shown.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="another model, for paired tests on these patients; or, without model and shards, two results of --out",
    )


SCORED = (
    *("split", "labelset", "labels_from", "score", "temperature", "ensemble", "average", "batch_zscore"),
    *("no_calibration", "collapse_texts", "blur", "shuffle_labels", "subgroups", "probe", "corruptions", "baseline"),
    *("against", "pointing", "show_images"),
)
"""What a protocol says itself, and what two written results have behind them."""


def _refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """An option that would be ignored is a mistake."""
    if beside := [name for name in names if getattr(args, name)]:
        raise UserError(f"{why}: leave --{beside[0].replace('_', '-')} away")


def _run_evaluate(args: argparse.Namespace) -> None:
    from medclip_lab.files import write_json

    for path, name in ((args.out, "--out"), (args.page, "--page")):
        if path and path.is_dir():
            raise UserError(f"{name}: {path} is a folder; name a file")
    if args.draws < 1:
        raise UserError(f"--draws: at least one bootstrap draw is needed, got {args.draws}")
    if args.bundle is None and args.compare:
        from medclip_lab.evaluation import compare

        _refuse(args, (*SCORED, "truncate", "protocol", "list", "page"), "--compare of two results stands alone")
        if len(args.compare) != 2:
            raise UserError("--compare: without a model and shards, name two results of --out")
        compared = compare.compare(*map(Path, args.compare), draws=args.draws, seed=args.seed)
        if args.out:
            write_json(args.out, compared | {"command": args.command})
        say(args, compared, compare.summary(compared))
        return
    if args.bundle is None or args.shards is None:
        raise UserError("name a model and shards, or two results with --compare")
    if args.protocol:
        _run_protocol(args)
        return
    if args.list:
        raise UserError("--list belongs to --protocol")
    _run_suite(args)


def _run_protocol(args: argparse.Namespace) -> None:
    from medclip_lab.evaluation.protocol_tasks import run_protocol, summary
    from medclip_lab.files import write_json
    from medclip_lab.inference.foreign import open_encoder

    _refuse(args, (*SCORED, "compare"), "--protocol stands alone")
    listed = None
    if args.list:
        try:
            listed = args.list.read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(f"--list: cannot read {args.list}: {error.strerror}") from None
    model = open_encoder(args.bundle)
    settings = {"draws": args.draws, "seed": args.seed, "max_bad": args.max_bad, "truncate": args.truncate}
    result = run_protocol(
        model,
        args.shards,
        args.protocol,
        listed=listed,
        keep=args.out,
        page=args.page,
        command=args.command,
        **settings,
    )
    if args.out:
        write_json(args.out, result | {"command": args.command})
    say(args, result, summary(result))


def _run_suite(args: argparse.Namespace) -> None:
    from medclip_lab.evaluation import compare, protocol, suite
    from medclip_lab.files import write_json
    from medclip_lab.inference.foreign import open_encoder

    if args.baseline and not args.corruptions:
        raise UserError("--baseline belongs to --corruptions")
    if args.show_images and not args.page:
        raise UserError("--show-images belongs to --page")
    if args.average and not args.ensemble:
        raise UserError("--average belongs to --ensemble")
    split, labelset = args.split or "test", args.labelset or LABELSET
    extras = suite.Extras(
        subgroups=args.subgroups,
        probes=args.probe,
        corruptions=args.corruptions,
        baseline=args.baseline,
        against=args.against,
        pointing=args.pointing,
    )
    if len(args.compare) > 1:
        raise UserError("--compare: one other model beside a model and shards")
    scoring = protocol.Scoring(
        args.score, args.temperature, args.batch_zscore, args.truncate, calibrated=not args.no_calibration
    )
    models = suite.Models(
        scoring,
        [open_encoder(other) for other in args.ensemble],
        args.average or "scores",
        *map(open_encoder, args.compare),
    )
    model = open_encoder(args.bundle)
    evaluated = suite.run(
        model,
        args.shards,
        split,
        labelset,
        extras,
        models,
        collapse=args.collapse_texts,
        draws=args.draws,
        seed=args.seed,
        change=protocol.blur(args.blur) if args.blur else None,
        control=args.shuffle_labels,
        max_bad=args.max_bad,
        labels_from=args.labels_from or "labels",
    )
    evaluated.results["blur"] = args.blur or None
    result = evaluated.results | {"command": args.command}
    if args.out:
        write_json(args.out, result)
        compare.save_scores(args.out, evaluated.data, evaluated.scores, evaluated.found.held_out.study_ids)
    if args.page:
        from medclip_lab.evaluation.report_page import write_page

        write_page(args.page, model, evaluated, labelset, args.command, args.shards if args.show_images else None)
    say(args, result, "\n".join([protocol.summary(result), *suite.summary(result)]))


def add_calibrate(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "calibrate",
        "probabilities, thresholds and an out-of-domain flag for a bundle, from validation patients",
        "calibrate bundle shards --split val --method platt --threshold sensitivity=0.95",
        _run_calibrate,
    )
    parser.add_argument("bundle", type=Path, help="gets the calibration, in place of an earlier one for the label set")
    parser.add_argument("shards", type=Path)
    parser.add_argument("--split", default="val", help="never test (default: val)")
    add_scoring(parser)
    add_labels_from(parser)
    add_ensemble(parser)
    parser.add_argument(
        "--method",
        default="platt",
        help="platt, isotonic (a thousand images or more) or temperature (default: platt)",
    )
    parser.add_argument("--threshold", default="youden", help="youden, mcc or sensitivity=0.95 (default: youden)")
    parser.add_argument(
        "--false-alarm", type=float, default=0.05, help="share of images that may be out of domain (default: 0.05)"
    )
    add_max_bad(parser)


def _run_calibrate(args: argparse.Namespace) -> None:
    from medclip_lab.evaluation.calibrate import calibrate, summary
    from medclip_lab.evaluation.protocol import Scoring
    from medclip_lab.inference.encoder import load

    if "train" in args.split.split("+"):
        print(
            "WARNING: split train is what the model was fitted on: its probabilities will be too sure; take val",
            file=sys.stderr,
        )
    if args.average and not args.ensemble:
        raise UserError("--average belongs to --ensemble")
    encoder = load(args.bundle)
    calibration = calibrate(
        encoder,
        args.shards,
        args.labelset,
        args.split,
        method=args.method,
        threshold=args.threshold,
        false_alarm=args.false_alarm,
        scoring=Scoring(args.score, args.temperature, truncate=args.truncate, calibrated=False),
        max_bad=args.max_bad,
        command=args.command,
        labels_from=args.labels_from,
        ensemble=[load(other) for other in args.ensemble],
        average=args.average or "scores",
    )
    calibration.save(encoder.folder)
    told = {name: value for name, value in calibration.facts.items() if name != "patients"}
    say(args, told | {"hash": calibration.hash}, summary(calibration))


def add_explain(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "explain",
        "where in an image the similarity to a prompt comes from",
        'explain bundle chest.png "Left pleural effusion." --against "No pleural effusion." --out map.png',
        _run_explain,
    )
    parser.add_argument("bundle")
    parser.add_argument("image", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--against", nargs="+", default=[], help="prompts whose similarity is taken away")
    parser.add_argument(
        "--method",
        choices=("auto", "patches", "gradcam", "hirescam"),
        default="auto",
        help="auto: patches for a ViT, hirescam for a convolutional tower (default: auto)",
    )
    parser.add_argument(
        "--stage", type=int, default=None, help="of a convolutional tower, -1 being the last (default: all)"
    )
    parser.add_argument("--out", type=Path, required=True, help="PNG of what the tower saw, with the map over it")


def _run_explain(args: argparse.Namespace) -> None:
    from medclip_lab.inference.explain import explain, save_overlay
    from medclip_lab.inference.foreign import open_encoder

    told = explain(
        open_encoder(args.bundle), args.image, args.prompt, args.against, method=args.method, stage=args.stage
    )
    save_overlay(told, args.out)
    cells = "x".join(map(str, told.relevance.shape))
    value = {
        "similarity": told.similarity,
        "method": told.method,
        "cells": told.relevance.tolist(),
        "frame": told.frame,
    }
    say(args, value, f"{args.out}: {told.method}, {cells} cells, similarity {told.similarity:.3f}")
    print("a map says what moved the score, not what is ill", file=sys.stderr)
