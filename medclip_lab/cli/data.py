"""Verbs of the data: from source files to shards."""

import argparse
from pathlib import Path

from medclip_lab.cli.common import Verbs, add_max_bad, add_verb, say


def add_prepare(verbs: Verbs) -> None:
    parser = verbs.add_parser("prepare", help="source files to shards", description="Source files to shards.")
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)

    def source(name: str, help_text: str, example: str) -> argparse.ArgumentParser:
        added = add_verb(sources, name, help_text, f"prepare {example}", _run_prepare)
        added.epilog = f"example:\n  medclip-lab prepare {example}"
        added.add_argument("--out", type=Path, required=True, help="folder for the shards")
        added.add_argument("--samples-per-shard", type=int, default=256, help="studies in a shard (default: 256)")
        add_max_bad(added)
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
    say(args, manifest, summary)
