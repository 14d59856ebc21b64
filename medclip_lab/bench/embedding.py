"""What `embed` costs beside the towers alone, on batches that are decoded already."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medclip_lab.bench.data_shards import KINDS, made, write
from medclip_lab.bench.index import environment
from medclip_lab.bench.serve import make_bundle
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.errors import UserError
from medclip_lab.files import atomic_folder
from medclip_lab.inference.encoder import Encoder, load
from medclip_lab.retrieval.embed import Timing, embed_shard, loader
from medclip_lab.retrieval.parts import EmbedConfig, Part

SPEC = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "vit_small_patch16_224", "image_size": 224, "timm_pool": "token"},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 6},
}
"""Towers of the size that one trains oneself; a larger one makes the share of all else smaller."""


def bench_embed(
    bundle: Path | None, samples: int, repeats: int, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Decode `samples` studies once; then, in turn, hand the batches to the towers alone and to `embed_shard`, which
    checks, writes and hashes too. Seconds on the clock, and of all cores, which other work disturbs less.

    Args:
        bundle: None makes one of SPEC with random weights.

    Raises:
        UserError: nothing to measure.
    """
    if samples < 1 or repeats < 1:
        raise UserError(f"bench: at least one sample and one repeat, got {samples} and {repeats}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder = load(bundle or make_bundle(folder / "bundle", SPEC, 224), "cpu")
        write(made(KINDS["320-jpeg"], samples), folder / "shards", folder / "not-needed")
        config = EmbedConfig()
        shards = Manifest.load(folder / "shards").shards
        batches = [(shard, list(loader(encoder, shard, config, 0))) for shard in shards]
        took: dict[str, list[tuple[float, float]]] = {"bare": [], "embed": []}
        for turn in range(repeats + 1):
            with atomic_folder(folder / f"out-{turn}") as out:
                seconds = {
                    "bare": _timed(lambda: _bare(encoder, batches)),
                    "embed": _timed(lambda out=out: _ours(encoder, batches, out, config)),  # type: ignore[misc]
                }
            for name, given in seconds.items() if turn else ():  # the first turn warms up
                took[name].append(given)
                if say is not None:
                    say(f"{name}: {given[0]:.2f} s, {given[1]:.2f} s of cores")
    clock, cores = ({name: statistics.median(g[n] for g in given) for name, given in took.items()} for n in (0, 1))
    return {
        "samples": samples,
        "batch_size": config.batch_size,
        "repeats": repeats,
        "bundle": "given" if bundle else SPEC,
        **environment(),
        "torch_threads": torch.get_num_threads(),
        "seconds": {name: round(value, 6) for name, value in clock.items()},
        "seconds_of_cores": {name: round(value, 6) for name, value in cores.items()},
        "aims": {
            "embed over the bare encoder on the same decoded batches": {
                "asked": "<= 5 %",
                "measured": f"{100 * (clock['embed'] / clock['bare'] - 1):.1f} %",
            },
            "the same by seconds of cores": {
                "asked": "<= 5 %",
                "measured": f"{100 * (cores['embed'] / cores['bare'] - 1):.1f} %",
            },
        },
    }


Batches = list[tuple[Shard, list[Part]]]


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    clock, cores = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cores


@torch.inference_mode()
def _bare(encoder: Encoder, batches: Batches) -> None:
    towers = encoder.model.towers
    for _, parts in batches:
        for part in parts:
            for name, given in (("image", part.pixels), ("text", part.tokens)):
                if given is not None:
                    towers[name](given)


def _ours(encoder: Encoder, batches: Batches, out: Path, config: EmbedConfig) -> None:
    for shard, parts in batches:
        quarantine = Quarantine(shard.samples, 0.0)
        embed_shard(encoder, shard, iter(parts), out, config, quarantine, Timing())
