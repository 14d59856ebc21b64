"""The report as text."""

from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """The report as tables."""
    told = result["facts"]
    where = told.get("gpu", told["device"])
    lines = [f"# Fused losses on {where}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    lines += [f"Commit {told['commit']}, {told['date']}; {versions}, Python {told['python']}.", ""]
    rate = result.get("matrix_rate")
    if rate:
        lines += [f"Matrix rate of this run: {rate / 1e12:.4g} TFLOP/s (square product, {told['device']}).", ""]
    if "correctness" in result:
        lines += ["## Right?", "", "| loss | cases | loss error | gradient | worst row | scale and bias | holds |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name in dict.fromkeys(row["loss"] for row in result["correctness"]):
            rows = [row for row in result["correctness"] if row["loss"] == name]
            worst = [max(row[key] for row in rows) for key in ("loss_error", "gradient", "row", "scalar")]
            holds = sum(row["holds"] for row in rows)
            lines.append(
                f"| {name} | {len(rows)} | {' | '.join(f'{value:.1e}' for value in worst)} | {holds} of {len(rows)} |"
            )
        lines.append("")
    if "behaviour" in result:
        names = list(next(iter(result["behaviour"].values())))
        lines += [f"| loss | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for loss, checks in result["behaviour"].items():
            marks = ["yes" if checks.get(name) else "NO" for name in names]
            failed = "" if set(checks) == set(names) else " " + "; ".join(checks)
            lines.append(f"| {loss}{failed} | {' | '.join(marks)} |")
        lines.append("")
    if "speed" in result:
        lines += ["## Forward and backward", "", "| loss | batch x dim | ms (p10-p90) | TFLOP/s | of the matrix rate |"]
        lines += ["|---|---|---|---|---|"]
        for row in result["speed"]:
            ours = row["seconds"]["ours"]
            head = f"| {row['loss']} | {row['batch']:,} x {row['dim']} |"
            if isinstance(ours, str):
                lines.append(f"{head} {ours} | | |")
                continue
            share = f"{row['flops'] / rate:.0%}" if rate else ""
            lines.append(
                f"{head} {1e3 * ours['median']:.3g} ({1e3 * ours['p10']:.3g}-{1e3 * ours['p90']:.3g}) | "
                f"{row['flops'] / 1e12:.3g} | {share} |"
            )
        lines += ["", "| loss | batch x dim | peer | ms | times slower than ours |", "|---|---|---|---|---|"]
        for row in result["speed"]:
            ours = row["seconds"]["ours"]
            for peer, value in row["seconds"].items():
                if peer == "ours":
                    continue
                head = f"| {row['loss']} | {row['batch']:,} x {row['dim']} | {peer} |"
                if isinstance(value, str) or isinstance(ours, str):
                    lines.append(f"{head} {value if isinstance(value, str) else ''} | |")
                else:
                    ratio = value["median"] / ours["median"]
                    lines.append(f"{head} {1e3 * value['median']:.3g} | {ratio:.2f} |")
        lines.append("")
    if "memory" in result:
        lines += [
            "## Memory at the peak beyond the inputs",
            "",
            "| loss | batch x dim | ours | dense torch |",
        ]
        lines += ["|---|---|---|---|"]
        for row in result["memory"]:
            cells = [_gib(row["bytes"].get(who)) for who in ("ours", "dense torch")]
            lines.append(f"| {row['loss']} | {row['batch']:,} x {row['dim']} | {' | '.join(cells)} |")
        lines.append("")
    if result.get("largest"):
        top = result["largest"]
        seconds = top["seconds"] if isinstance(top["seconds"], str) else f"{top['seconds']:.3g} s"
        lines += [f"Largest batch tried: {top['batch']:,} x {top['dim']}, {top['loss']}: {seconds}.", ""]
    if "tune" in result:
        lines += ["## Shapes of tiles", "", "| tile | shape | ms of a step | TFLOP/s | |", "|---|---|---|---|---|"]
        for row in result["tune"]:
            head, mark = f"| {row['kind']} | {row['shape']} |", "shipped" if row["shipped"] else ""
            if isinstance(row["seconds"], str):
                lines.append(f"{head} {row['seconds']} | | {mark} |")
            else:
                lines.append(f"{head} {1e3 * row['seconds']:.3g} | {row['flops'] / 1e12:.3g} | {mark} |")
        lines.append("")
    return "\n".join(lines)


def _gib(value: Any) -> str:
    if isinstance(value, int):
        return f"{value / 2**30:.3g} GiB"
    return "" if value is None else str(value)
