"""The service under load, beside plain FastAPI and LitServe with the same model on this machine."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medclip_lab.bench.machine import facts, stolen_seconds
from medclip_lab.bench.processes import cpu_seconds
from medclip_lab.bench.serve_load import send
from medclip_lab.errors import UserError

SIDES = ("medclip-lab", "medclip-lab-onnx", "fastapi", "litserve")
OURS = SIDES[:2]
PACKAGES = {"medclip-lab-onnx": ("onnxscript", "onnxruntime"), "litserve": ("litserve",)}
"""What a side needs beside the service's own."""
CLIENTS = (1, 4, 16, 64)
BOUND = 32
"""Places of the service that 64 clients want to enter at once."""
MAX_BATCH, MAX_DELAY = 16, 0.004
STOLEN, ATTEMPTS = 0.03, 4
"""Share of the cores that a load may lack, and how often it is tried."""
SPEC: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 128, "layers": 4, "width": 128, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
"""A small ViT with weights by lot: what it says does not matter here, and how long it takes does."""


def bench_serve(
    bundle: Path | None = None,
    only: Sequence[str] = (),
    seconds: float = 10.0,
    repeats: int = 3,
    say: Callable[[str], None] | None = None,
    minutes: float | None = None,
) -> dict[str, Any]:
    """Latency and throughput over loopback by number of clients, and ratios to the peers; or a mixed load for long.

    "medclip-lab-onnx" is the service with its towers in ONNX Runtime.

    Each service runs in processes of its own, which are stopped while another is asked; each number of clients loads
    the sides in turn, `repeats` times, so that a machine that is slower for a while is so for all. Ratios are medians
    over repeats. The client shares the machine with the service, for all sides alike.

    Args:
        bundle: to serve; None makes a small one.
        only: names of SIDES; all if empty.
        seconds: of each load.
        say: told of each result as it comes.
        minutes: of a mixed load on our side alone, in place of all else.

    Raises:
        UserError: an unknown side, LitServe missing, no bundle.
    """
    sides = tuple(only) or SIDES
    if unknown := [side for side in sides if side not in SIDES]:
        raise UserError(f"bench serve: no side is named {unknown[0]!r} (there are {', '.join(SIDES)})")
    if repeats < 1 or seconds <= 0:
        raise UserError(f"bench serve: repeats and seconds must be above 0, got {repeats} and {seconds}")
    if minutes is not None and minutes <= 0:
        raise UserError(f"bench serve: minutes must be above 0, got {minutes}")
    for side in sides if minutes is None else ():
        if missing := [name for name in PACKAGES.get(side, ()) if find_spec(name) is None]:
            packages = " ".join(missing)
            raise UserError(f"bench serve: {side} needs pip install {packages}, or name other sides by --only")
    tell = say or (lambda _line: None)
    with tempfile.TemporaryDirectory() as folder:
        served = bundle or make_bundle(Path(folder) / "bundle")
        images = [image(seed) for seed in range(8)]
        if minutes is not None:
            return _facts(()) | {"mixed": mixed(served, images, minutes, Path(folder), tell)}
        options: dict[str, tuple[str, ...]] = {}
        if "medclip-lab-onnx" in sides:
            from medclip_lab.inference.to_onnx import to_onnx

            to_onnx(served, Path(folder) / "onnx")
            options["medclip-lab-onnx"] = ("--onnx", str(Path(folder) / "onnx"))
        bodies = {side: bodies_for(side, images) for side in sides}
        bare: list[float] = []
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        with contextlib.ExitStack() as stack:
            places = {}
            for side in sides:
                places[side] = stack.enter_context(started(side, served, options.get(side, ())))
                os.killpg(places[side][1], signal.SIGSTOP)
            for _ in range(repeats):
                bare.append(bare_latency(served, images))
                tell(f"bare classifier: {bare[-1]:.2f} ms")
                for side in sides:
                    runs[side].append({"clients": {}})
                for number in CLIENTS:
                    for side in sides:
                        with awake(places[side][1]):
                            load = measure(side, *places[side], bodies[side], number, seconds)
                        runs[side][-1]["clients"][str(number)] = load
                        tell(f"{side}, {number} clients: {_short(load)}")
        bounded = None
        if "medclip-lab" in sides:
            with started("medclip-lab", served, ("--max-waiting", str(BOUND))) as (base, process):
                load = measure("medclip-lab", base, process, bodies["medclip-lab"], 64, seconds)
            bounded = {"clients": {"64": load}}
            tell(f"64 clients, {BOUND} places: {_short(load)}")
    result: dict[str, Any] = _facts(sides) | {
        "settings": {"max_batch": MAX_BATCH, "max_delay": MAX_DELAY, "seconds": seconds, "repeats": repeats},
        "bare_p50_ms": [round(one, 2) for one in bare],
        "runs": runs,
        "bounded": bounded,
    }
    return result | {"ratios": ratios(runs, bare, bounded)}


def _facts(sides: Sequence[str]) -> dict[str, Any]:
    others = [PACKAGES[side][-1] for side in sides if side in PACKAGES]
    return facts(("torch", "fastapi", "uvicorn", *others))


def mixed(
    bundle: Path, images: Sequence[bytes], minutes: float, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Every kind of request on our side for a while; the index is made up."""
    from medclip_lab.bench.serve_mixed import bear, make_index
    from medclip_lab.inference.encoder import load

    encoder = load(bundle)
    index = make_index(folder / "index", encoder.fingerprint, encoder.encode_texts(["width"]).shape[1])
    with started("medclip-lab", bundle, ("--index", str(index))) as (base, process):
        return bear(base, process, images, minutes, tell)


def ratios(
    runs: dict[str, list[dict[str, Any]]], bare: Sequence[float], bounded: dict[str, Any] | None
) -> dict[str, Any]:
    """What the figures come to: throughput beside each peer, latency that the service adds, and its tail when full."""
    told: dict[str, Any] = {}
    for side in OURS:
        ours, tail = runs.get(side, []), side.removeprefix("medclip-lab").replace("-", "_")
        for peer in sorted(runs.keys() - set(OURS)) if ours else ():
            loads = [(a["clients"]["16"], b["clients"]["16"]) for a, b in zip(ours, runs[peer], strict=True)]
            for name, figure in (("throughput_16_over", "per_second"), ("cpu_a_request_16_over", "cpu_ms")):
                found = statistics.median(a[figure] / max(b[figure], 1e-9) for a, b in loads)
                told[f"{name}_{peer}{tail}"] = round(found, 2)
        if ours:
            added = (run["clients"]["1"]["p50_ms"] - alone for run, alone in zip(ours, bare, strict=True))
            told[f"added_ms_at_1{tail}"] = round(statistics.median(added), 2)
    if bounded:
        load = bounded["clients"]["64"]
        told["p99_over_p50_at_64_bounded"] = round(load["p99_ms"] / load["p50_ms"], 2) if load["answered"] else None
        asked = sum(load["statuses"].values())
        told["shares_at_64_bounded"] = {name: round(count / asked, 4) for name, count in load["statuses"].items()}
        told["unanswered_at_64_bounded"] = load["statuses"].get("0", 0)
    return told


def bodies_for(side: str, images: Sequence[bytes]) -> list[bytes]:
    """What each image looks like as a request to a side."""
    encoded = [base64.b64encode(one).decode() for one in images]
    return [json.dumps({"images": [{"data": one}]} if side in OURS else {"data": one}).encode() for one in encoded]


def measure(
    side: str, base: str, process: int, bodies: Sequence[bytes], clients: int, seconds: float
) -> dict[str, Any]:
    """Load one side that runs; again while neighbours of a virtual machine took more than `STOLEN` of it meanwhile.

    The load they disturbed least is the one that counts.
    """
    url = f"{base}/v1/classify" if side in OURS else f"{base}/classify"
    loads: list[dict[str, Any]] = []
    for attempt in range(1, ATTEMPTS + 1):
        before = _batches(base) if side in OURS else {}
        cpu, stolen, start = cpu_seconds(process), stolen_seconds(), time.perf_counter()
        load = send(url, bodies, clients, seconds).summary()
        taken = (stolen_seconds() - stolen) / (time.perf_counter() - start) / (os.cpu_count() or 1)
        # Those of the warm-up count here for both.
        load["cpu_ms"] = round(1000 * (cpu_seconds(process) - cpu) / max(load["sent"], 1), 2)
        load |= {"stolen": round(taken, 3), "attempt": attempt}
        if side in OURS:
            after = _batches(base)
            load["batches"] = {size: after[size] - before.get(size, 0) for size in after}
        loads.append(load)
        if taken <= STOLEN:
            break
    return min(loads, key=lambda load: float(load["stolen"]))


@contextlib.contextmanager
def awake(process: int) -> Iterator[None]:
    """Let a stopped group of processes run while the block does: others poll even when nobody asks them."""
    os.killpg(process, signal.SIGCONT)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGSTOP)


@contextlib.contextmanager
def started(side: str, bundle: Path, options: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The address of a side that runs while the block does, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    batching = [str(MAX_BATCH), str(MAX_DELAY)]
    limits = ["--max-batch", batching[0], "--max-delay-ms", str(1000 * MAX_DELAY)]
    own = ["medclip_lab", "serve", str(bundle), "--port", port, *limits, *options]
    ways = {
        **dict.fromkeys(OURS, own),
        "fastapi": ["medclip_lab.bench.serve_peers", str(bundle), port],
        "litserve": ["medclip_lab.bench.serve_litserve", str(bundle), port, *batching],
    }
    command = [sys.executable, "-m", *ways[side]]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603 - ours
        try:
            base = f"http://127.0.0.1:{port}"
            _wait(process, base, log)
            yield base, process.pid
        finally:
            # LitServe has children: the whole group goes, asked first.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: "subprocess.Popen[bytes]", base: str, log: Any) -> None:
    for _ in range(600):
        if process.poll() is not None:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"bench serve: a service did not start: {last[-1] if last else 'no word of it'}")
        try:
            urllib.request.urlopen(f"{base}/openapi.json", timeout=2).close()  # noqa: S310 - loopback
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise UserError("bench serve: a service did not answer within two minutes")


def _batches(base: str) -> dict[str, int]:
    """How many batches were at most so large, by the service's own figures."""
    with urllib.request.urlopen(f"{base}/metrics") as answer:  # noqa: S310 - loopback
        lines = answer.read().decode().splitlines()
    start = 'medclip_batch_size_bucket{kind="image",le="'
    counts = [line[len(start) :].split('"} ') for line in lines if line.startswith(start)]
    total, sizes = 0, {}
    for size, count in counts:
        sizes[size], total = int(float(count)) - total, int(float(count))
    return sizes


def bare_latency(bundle: Path, images: Sequence[bytes]) -> float:
    """Median milliseconds from an image to its scores by the classifier alone, in a process of its own as all sides."""
    command = [sys.executable, "-m", "medclip_lab.bench.serve_peers", str(bundle)]
    encoded = "\n".join(base64.b64encode(one).decode() for one in images)
    told = subprocess.run(command, input=encoded, capture_output=True, text=True, check=True)  # noqa: S603 - ours
    return float(told.stdout)


def image(seed: int, side: int = 512) -> bytes:
    """A smooth grey JPEG with some grain, about as large as a film of that side."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray((chance.random((12, 12)) * 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    grain = np.clip(np.asarray(coarse, dtype=np.float32) + chance.normal(0, 6, (side, side)), 0, 255)
    buffer = io.BytesIO()
    Image.fromarray(grain.astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_bundle(out: Path, spec: dict[str, Any] = SPEC, size: int = 128) -> Path:
    """A bundle with weights by lot, for images of this size."""
    import torch

    from medclip_lab.config import shipped
    from medclip_lab.data.preprocess import PreprocessConfig
    from medclip_lab.inference.bundle import finish_bundle, write_bundle
    from medclip_lab.models.spec import build_spec

    torch.manual_seed(0)
    out.mkdir(parents=True)
    write_bundle(
        out,
        weights={name: value.contiguous() for name, value in build_spec(spec).state_dict().items()},
        model_cfg=spec,
        preprocess=PreprocessConfig(size=size),
        tokenizer=None,
        labelsets=[shipped("labelsets/chexpert14.yaml")],
        card={"weights": "by lot"},
        augment={},
    )
    finish_bundle(out, "bench serve", {})
    return out


def _short(load: dict[str, Any]) -> str:
    return f"{load['per_second']}/s, p50 {load['p50_ms']} p99 {load['p99_ms']} ms"


def table(result: dict[str, Any]) -> str:
    """The last run of each side, line by line, and the ratios; of a mixed load what came of it."""
    if "mixed" in result:
        return "\n".join(f"{name}: {value}" for name, value in result["mixed"].items() if name != "memory_mib")
    lines = [f"{'side':<18}{'clients':>8}{'per s':>9}{'p50 ms':>9}{'p95 ms':>9}{'p99 ms':>9}{'cpu ms':>9}"]
    for side, runs in result["runs"].items():
        for number, load in runs[-1]["clients"].items():
            figures = "".join(f"{load[name]!s:>9}" for name in ("per_second", "p50_ms", "p95_ms", "p99_ms", "cpu_ms"))
            lines.append(f"{side:<18}{number:>8}{figures}")
    lines.append(f"bare classifier: {result['bare_p50_ms']} ms")
    lines += [f"{name}: {value}" for name, value in result["ratios"].items()]
    return "\n".join(lines)
