"""Measure the fused losses on this machine's GPU: right, fast, small? Under eight minutes; needs torch and Triton only.

    python tools/gpu_report.py --out benchmarks/gpu
    python tools/gpu_report.py --parts matrix_rate tune --out runs/tune  # other shapes of tiles beside the shipped ones
    python tools/gpu_report.py --device cpu --out runs/rehearsal  # tiny sizes: does the script itself run?

Writes OUT.json and OUT.md after every part, so that a run that is cut short leaves what it had.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from medclip_lab import gpu_bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu"))
    parser.add_argument(
        "--parts", nargs="*", default=[], help="some of: correctness behaviour matrix_rate speed memory largest tune"
    )
    parser.add_argument("--tiles", nargs="*", default=[], help="kinds that tune tries: sigmoid logsumexp softmax ...")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv])}
    rehearsal = args.device == "cpu"
    sizes, impl = (gpu_bench.TINY, "chunked") if rehearsal else (gpu_bench.Sizes(), "fused")
    parts = gpu_bench.measure(args.device, impl, sizes, lambda line: print(line, flush=True), args.parts, args.tiles)
    for name, part in parts:
        result[name] = part
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(gpu_bench.markdown(result) + "\n")
    print(gpu_bench.markdown(result))
    wrong = [row for row in result.get("correctness", []) if not row["right"]]
    wrong += [name for name, checks in result.get("behaviour", {}).items() if not all(checks.values())]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
