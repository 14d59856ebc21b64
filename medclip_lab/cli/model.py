"""Verbs of the model: train, export, evaluate, calibrate, classify, and the demo of them all."""

import argparse
from pathlib import Path
from typing import Any

from medclip_lab.cli.common import Verbs, add_ensemble, add_scoring, add_verb, say
from medclip_lab.errors import UserError


def add_demo(verbs: Verbs) -> None:
    parser = add_verb(
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
    say(args, result, result["summary"])


def add_train(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "train",
        "train from a config; called again, an interrupted run goes on",
        "train --config configs/phantom.yaml --out runs/phantom --optim.lr=5e-4 --trainer.epochs=5",
        _run_train,
    )
    parser.usage = (
        "medclip-lab train --config FILE [--out DIR] [--resume auto|never] [--profile [N]] [--SECTION.NAME=VALUE ...]\n"
        "       medclip-lab train --settings\n"
        "       medclip-lab train --replay DUMP"
    )
    parser.add_argument("--config", type=Path, help="a YAML file, or the name of a shipped one")
    parser.add_argument("--out", default=None, help="folder of the run")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on from the folder's newest whole checkpoint (default); never: refuse a folder that has one",
    )
    parser.add_argument("--replay", type=Path, metavar="DUMP", help="make the step of a dump again, and say what broke")
    parser.add_argument("--settings", action="store_true", help="list every setting with its default, and stop")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=5,
        default=0,
        metavar="N",
        help="look at N steps (default: 5) with torch's profiler: a table, and a trace in the run's folder",
    )


def _run_train(args: argparse.Namespace) -> None:
    from medclip_lab import config as configs
    from medclip_lab.distributed import launched_world
    from medclip_lab.files import read_json
    from medclip_lab.training.console import diary
    from medclip_lab.training.resume import DONE
    from medclip_lab.training.run import RunConfig, train

    if args.settings:
        configs.parser(RunConfig).print_help()
        return
    if args.replay is not None:
        from medclip_lab.training.replay import replay, summary

        result = replay(args.replay)
        say(args, result, summary(result))
        return
    if args.config is None:
        raise UserError("--config is missing: a YAML file, or the name of a shipped one (phantom, nih_openi_semantic)")
    path = args.config
    if not path.exists() and configs.shipped(f"{path}.yaml").exists():
        path = configs.shipped(f"{path}.yaml")
    overrides = [*args.overrides, f"--out={args.out}"] if args.out else args.overrides
    if args.profile < 0:
        raise UserError(f"--profile: a number of steps, got {args.profile}")
    run = train(configs.load_config(RunConfig, path, overrides), args.resume, args.profile)
    if launched_world()[0] > 0:
        return  # one rank speaks
    last = [line for line in diary(run) if "loss" in line][-1]
    told = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    unusable = read_json(run / DONE, "run").get("unusable", {})
    lines = [f"{run}: step {last['step']}, loss {told}"]
    for source, causes in unusable.items():
        told = ", ".join(f"{count} {cause}" for cause, count in causes.items())
        lines.append(f"unusable samples of {source}: {told}, listed in {run / 'quarantine.jsonl'}")
    say(args, {"run": str(run), **last, "unusable": unusable}, "\n".join(lines))


def add_export(verbs: Verbs) -> None:
    parser = add_verb(verbs, "export", "a finished run to a bundle", "export runs/phantom --out bundle", _run_export)
    parser.add_argument(
        "run_folder", metavar="run", type=Path, help="folder of a finished run; with --to onnx and others of a bundle"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--labelset", nargs="*", default=["chexpert14"], help="label sets to carry")
    parser.add_argument(
        "--to",
        choices=("bundle", "transformers", "vision", "onnx", "timm"),
        default="bundle",
        help="of a bundle: transformers, a folder for Hugging Face's zero-shot-image-classification; vision, the image "
        "tower alone for LLaVA; onnx, each tower as a graph; timm, the image tower (default: bundle)",
    )
    parser.add_argument(
        "--precision", choices=("float32", "int8"), default=None, help="of onnx; int8: what it costs is in its JSON"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=None,
        metavar="N",
        help="of transformers and vision: interpolate position embeddings to N x N pixels, as 336 (default: no)",
    )
    parser.add_argument("--truncate", action="store_true", help="cut prompts that are longer than the context")


def _run_export(args: argparse.Namespace) -> None:
    if args.precision is not None and args.to != "onnx":
        raise UserError("--precision belongs to --to onnx")
    if args.image_size is not None and args.to not in ("transformers", "vision"):
        raise UserError("--image-size belongs to --to transformers and --to vision")
    if args.to in ("transformers", "vision"):
        from medclip_lab.inference.to_transformers import to_transformers
        from medclip_lab.inference.to_vision import to_vision

        write = to_vision if args.to == "vision" else to_transformers
        facts = write(args.run_folder, args.out, args.command, args.image_size)
        difference = f"features within {facts['largest_difference']:.0e} of the bundle's"
        say(args, facts, f"{args.out}: a {facts['class']}, {difference}")
        return
    if args.to == "onnx":
        from medclip_lab.inference.to_onnx import summary, to_onnx

        facts = to_onnx(args.run_folder, args.out, args.command, args.precision or "float32")
        say(args, facts, f"{args.out}: {summary(facts)}")
        return
    if args.to == "timm":
        from medclip_lab.inference.to_timm import to_timm

        facts = to_timm(args.run_folder, args.out, args.command)
        say(
            args,
            facts,
            f"{args.out}: {facts['architecture']}, within {facts['largest_difference']:.0e} of the bundle's",
        )
        return
    from medclip_lab.training.export import export

    manifest = export(args.run_folder, args.out, args.labelset, args.command, args.truncate)
    say(args, manifest, f"{args.out}: bundle {manifest['fingerprint'][:12]}, {len(manifest['files'])} files")


def add_card(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "card",
        "the model card of a bundle, written anew with what people state and what was measured",
        "card bundle --facts card.yaml --evaluation openi=results.json",
        _run_card,
    )
    parser.add_argument("bundle", type=Path, help="its README.md is replaced; what is not given is not stated there")
    parser.add_argument(
        "--facts", type=Path, default=None, help="YAML of what only people know, as configs/deploy/card.yaml lists it"
    )
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="[NAME=]FILE",
        help="results of `evaluate --out`, with a name for the data (default: the protocol's)",
    )


def _run_card(args: argparse.Namespace) -> None:
    from medclip_lab.config import load_config
    from medclip_lab.inference.bundle import describe
    from medclip_lab.inference.card import CardFacts

    evaluations: dict[Path, str | None] = {}
    for text in args.evaluation:
        name, equals, file = text.partition("=")
        evaluations[Path(file if equals else text)] = name if equals else None
    path = describe(args.bundle, load_config(CardFacts, args.facts), evaluations)
    say(args, {"card": str(path)}, f"{path}: with {len(evaluations)} evaluations")


def add_classify(verbs: Verbs) -> None:
    parser = add_verb(
        verbs,
        "classify",
        "zero-shot scores of images, without any training on labels; decisions of a bundle that is calibrated",
        "classify bundle chest.png",
        _run_classify,
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--onnx", type=Path, default=None, help="folder of `export --to onnx`, to run the image tower")
    add_scoring(parser)
    add_ensemble(parser)


def _run_classify(args: argparse.Namespace) -> None:
    from medclip_lab.inference.calibration import Calibration
    from medclip_lab.inference.classifier import ZeroShotClassifier
    from medclip_lab.inference.encoder import load
    from medclip_lab.inference.ensemble import ClassifierEnsemble

    if args.average and not args.ensemble:
        raise UserError("--average belongs to --ensemble")
    if args.onnx is not None:
        from medclip_lab.inference.onnx_towers import with_onnx

        if args.ensemble:
            raise UserError("--onnx is the image tower of one bundle: leave --ensemble out")
        encoders = [with_onnx(load(args.bundle, "cpu"), args.onnx)]
    else:
        encoders = [load(bundle) for bundle in (args.bundle, *args.ensemble)]
    members = [
        encoder.zero_shot_classifier(args.labelset, args.score, temperature=args.temperature, truncate=args.truncate)
        for encoder in encoders
    ]
    classifier: ZeroShotClassifier | ClassifierEnsemble = members[0]
    if args.ensemble:
        classifier = ClassifierEnsemble(members, args.average or "scores")
    rows = classifier.classify(args.images)
    lines = []
    for image, row in zip(args.images, rows, strict=True):
        strange = row["out_of_domain"] is not None and row["out_of_domain"]["flag"]
        lines.append(f"{image}" + ("  OUT OF DOMAIN: unlike the images of the calibration" if strange else ""))
        lines += [_line(name, value) for name, value in sorted(row["labels"].items(), key=lambda i: -i[1]["score"])]
    if classifier.calibration is None:
        several = isinstance(classifier, ClassifierEnsemble)
        of = "the ensemble" if several else "the bundle"
        made = (
            classifier.made_for_members()
            if isinstance(classifier, ClassifierEnsemble)
            else Calibration.load(encoders[0].folder, classifier.labelset)
        )
        why = f"{of} is not calibrated"
        if made is not None:
            why = f"{of} is calibrated for {made.facts['rule']}, not for {classifier.rule}"
            if made.facts["labelset_hash"] != classifier.labelset_hash:
                why = f"{of} is calibrated for other prompts"
        lines.append(f"scores order images; they are not probabilities ({why})")
    else:
        lines.append(
            "operating: the probability on a scale where the threshold is 0.5; + is a decision for the finding"
        )
    say(args, [{"image": str(i), **r} for i, r in zip(args.images, rows, strict=True)], "\n".join(lines))


def _line(name: str, value: dict[str, Any]) -> str:
    if value["probability"] is None:
        bar = "#" * round(20 * min(max(value["score"], 0.0), 1.0))
        return f"  {value['score']:.3f}  {bar:<20}  {name}"
    sign = "+" if value["decision"] else " "
    told = f"probability {value['probability']:.3f}  operating {value['operating']:.3f}"
    return f"  {value['score']:.3f}  {sign} {told}  {name}"
