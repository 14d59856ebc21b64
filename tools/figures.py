"""Measure what the README promises: the demo, real radiographs and reports, label rules, and the cost of importing.

    python tools/figures.py demo --work FOLDER
    python tools/figures.py real --data FOLDER --work FOLDER --seeds 0 1 2
    python tools/figures.py evaluation --data FOLDER --work FOLDER
    python tools/figures.py labeller --data FOLDER
    python tools/figures.py import

Each writes `benchmarks/NAME.json` with command, commit, machine and date. `--data` names a folder with
`nih-cxr-1000/` and `openi-reports/NLMCXR_reports.tgz`.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medclip_lab.bench import machine
from medclip_lab.data.mesh import agreement, agreement_table, developed_on
from medclip_lab.data.sources.openi import OpenI
from medclip_lab.data.sources.reading import read_all
from medclip_lab.inference.bundle import versions

ROOT = Path(__file__).parents[1]


def call(*arguments: str) -> tuple[Any, float]:
    """JSON of a verb, run in a process of its own, and its seconds."""
    command = [sys.executable, "-m", "medclip_lab", *arguments, "--json"]
    print("+", "medclip-lab", *arguments, file=sys.stderr)
    start = time.monotonic()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout), time.monotonic() - start


def demo(args: argparse.Namespace) -> dict[str, Any]:
    result, seconds = call("demo", "--out", str(args.work / "demo"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    for name in ("page", "summary"):
        result.pop(name)
    return {**result, "whole_process_seconds": round(seconds, 1), "largest_process_gib": round(peak, 2)}


def real(args: argparse.Namespace) -> dict[str, Any]:
    nih, openi = args.work / "nih", args.work / "openi"
    call("prepare", "nih-cxr14", str(args.data / "nih-cxr-1000"), "--samples-per-shard", "64", "--out", str(nih))
    call("prepare", "openi", str(args.data / "openi-reports" / "NLMCXR_reports.tgz"), "--out", str(openi))
    seeds = []
    for seed in args.seeds:
        run, bundle = args.work / f"run{seed}", args.work / f"bundle{seed}"
        sources = [f"--data.sources.images.shards={nih}", f"--data.sources.reports.shards={openi}"]
        _, seconds = call(
            "train", "--config", "nih_openi_semantic", f"--seed={seed}", *sources, *args.settings, "--out", str(run)
        )
        call("export", str(run), "--out", str(bundle), "--labelset", "pneumonia")
        test = [str(bundle), str(nih), "--split", args.split, "--labelset", "pneumonia"]
        row: dict[str, Any] = {"seed": seed, "training_seconds": round(seconds, 1)}
        for name, extra in (("auroc", []), ("shuffled_labels", ["--shuffle-labels", f"--seed={seed}"])):
            result, _ = call("evaluate", *test, *extra)
            label = result["zero_shot"]["labels"][0]
            row[name] = round(label["auroc"], 4)
            row[f"{name}_interval"] = [round(label["low"], 4), round(label["high"], 4)]
        print(json.dumps(row), file=sys.stderr)
        seeds.append(row)
    mean = {
        name: round(statistics.mean(row[name] for row in seeds), 4)
        for name in ("auroc", "shuffled_labels", "training_seconds")
    }
    return {"split": args.split, "mean": mean, "seeds": seeds}


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """All that an evaluation tells, of one model that never saw the validation patients: they calibrate it."""
    nih, openi = args.work / "nih", args.work / "openi"
    run, bundle, out = args.work / "run-evaluation", args.work / "bundle-evaluation", args.work / "evaluation.json"
    if not (nih / "manifest.json").exists():
        call("prepare", "nih-cxr14", str(args.data / "nih-cxr-1000"), "--samples-per-shard", "64", "--out", str(nih))
    if not (openi / "manifest.json").exists():
        call("prepare", "openi", str(args.data / "openi-reports" / "NLMCXR_reports.tgz"), "--out", str(openi))
    if not (bundle / "manifest.json").exists():
        sources = [f"--data.sources.images.shards={nih}", f"--data.sources.reports.shards={openi}"]
        sources += ["--data.sources.images.split=train", f"--seed={args.seeds[0]}"]
        call("train", "--config", "nih_openi_semantic", *sources, *args.settings, "--out", str(run))
        call("export", str(run), "--out", str(bundle), "--labelset", "pneumonia")
    calibration, _ = call("calibrate", str(bundle), str(nih), "--split", "val", "--labelset", "pneumonia")
    calibration.pop("command")  # with the folders of this machine
    asked = ["--labelset", "pneumonia", "--subgroups", "sex", "age", "view", "--corruptions"]
    page = ["--page", str(out.with_suffix(".html"))]
    result, _ = call("evaluate", str(bundle), str(nih), "--split", args.split, *asked, "--out", str(out), *page)
    told = ("studies", "patients", "studies_hash", "bundle", "shards", "zero_shot", "subgroups", "corruptions")
    return {"seed": args.seeds[0], "settings": args.settings, "split": args.split, "calibration": calibration} | {
        name: result[name] for name in told
    }


def labeller(args: argparse.Namespace) -> dict[str, Any]:
    halves: dict[str, list[Any]] = {"held_out": [], "developed_on": []}
    for sample in read_all(OpenI(args.data / "openi-reports" / "NLMCXR_reports.tgz")):
        half = "developed_on" if developed_on(sample.study_id) else "held_out"
        halves[half].append((sample.labels, sample.extra["mesh_labels"]))
    result = {}
    for half, pairs in halves.items():
        rows = agreement(pairs)
        print(f"{half}, {len(pairs)} reports\n{agreement_table(rows)}", file=sys.stderr)
        measures = ("precision", "recall", "f1", "precision_strict", "recall_strict", "f1_strict")
        labels = [asdict(row) | {name: round(getattr(row, name), 3) for name in measures} for row in rows]
        mean = {name: round(statistics.mean(row[name] for row in labels), 3) for name in measures}
        result[half] = {"reports": len(pairs), "mean": mean, "labels": labels}
    return result


def imports(_: argparse.Namespace) -> dict[str, Any]:
    def seconds() -> float:
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import medclip_lab"], check=True)
        return time.monotonic() - start

    values = sorted(seconds() for _ in range(11))
    code = "import sys, medclip_lab; print([m for m in ('torch', 'lightning', 'faiss') if m in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return {"python_start_and_import_seconds_median": round(values[5], 3), "heavy_modules_imported": heavy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "real", "evaluation", "labeller", "import"))
    parser.add_argument("--work", type=Path, default=Path("runs/figures"), help="folder for what is made on the way")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--split", default="test", help="use val while anything is still being chosen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="last: overrides of the config")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": " ".join(["python", "tools/figures.py", args.what]),
        **machine.facts(),
        "platform": platform.platform(),
        "versions": versions(),
    }
    steps = {"demo": demo, "real": real, "evaluation": evaluation, "labeller": labeller, "import": imports}
    facts["result"] = steps[args.what](args)
    out = args.out or ROOT / "benchmarks" / f"{args.what}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["result"], indent=2))


if __name__ == "__main__":
    main()
