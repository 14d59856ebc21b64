"""The contestants of `bench data`: our loader, the same over plain webdataset, and open_clip's.

Each runs in a process of its own on one core.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CROP, ASPECT = (0.9, 1.0), 4 / 3  # open_clip's random resized crop; ours does the same
STAGE_SAMPLES = 256


def main() -> None:
    """Measure what the JSON of the first argument asks for and print the result as JSON."""
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    sides: dict[str, Callable[..., Any]] = {
        "ours": our_batches,
        "webdataset": plain_batches,
        "open_clip": their_batches,
    }
    batches = sides[job["side"]]
    settings = (Path(job["shards"]), job["size"], job["batch"], job["samples"], job["seed"])
    next(iter(batches(*settings)))  # libraries are loaded and tables built
    loader = batches(*settings)
    start, cpu_start, number = time.perf_counter(), time.process_time(), 0
    for batch in loader:
        image = batch["image"] if isinstance(batch, dict) else batch[0]
        number += len(image)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    result: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "samples": number}
    result |= {"peak_mib": _peak_mib(), "batch": f"{str(image.dtype).removeprefix('torch.')} {list(image.shape)}"}
    if job["stages"] and job["side"] != "webdataset":
        result["stage_ms"] = (our_stages if job["side"] == "ours" else their_stages)(*settings)
    print(json.dumps(result))


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024, 1)


@cache
def _tokenizer() -> Any:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")  # ships with open_clip, and is what its models use


def _our_config(shards: Path, size: int, batch: int) -> Any:
    from medclip_lab.data.augment import AugmentConfig
    from medclip_lab.data.pipeline import DataConfig, SourceConfig
    from medclip_lab.data.preprocess import PreprocessConfig

    return DataConfig(
        sources={"bench": SourceConfig(str(shards))},
        batch_size=batch,
        preprocess=PreprocessConfig(size=size, resize_mode="squash"),
        augment=AugmentConfig(crop=CROP, aspect=ASPECT),
        workers=0,
    )


def our_batches(shards: Path, size: int, batch: int, samples: int, seed: int) -> Iterable[Any]:
    from medclip_lab.data.pipeline import BatchStream, loader

    config = _our_config(shards, size, batch)
    return loader(BatchStream(config, _tokenizer(), samples // batch, seed=seed))


def plain_batches(shards: Path, size: int, batch: int, samples: int, seed: int) -> Iterable[Any]:
    from medclip_lab.bench.plain import PlainStream
    from medclip_lab.data.pipeline import loader

    config = _our_config(shards, size, batch)
    return loader(PlainStream(config, _tokenizer(), samples // batch, seed=seed))


def their_batches(shards: Path, size: int, batch: int, samples: int, seed: int) -> Iterable[Any]:
    from medclip_lab.bench.peer import open_clip_data

    args = SimpleNamespace(
        train_data="::".join(str(path) for path in sorted(shards.glob("*.tar"))),
        train_data_upsampling_factors=None,
        train_num_samples=samples // batch * batch,
        dataset_resampled=False,
        seed=seed,
        batch_size=batch,
        workers=0,
        world_size=1,
    )
    made = open_clip_data().get_wds_dataset(args, _their_transform(size), True, tokenizer=_tokenizer())
    loader: Iterable[Any] = made.dataloader
    return loader


def _their_transform(size: int) -> Any:
    from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2

    return image_transform_v2(PreprocessCfg(size=size), is_train=True, aug_cfg=AugmentationCfg(scale=CROP))


class Watch:
    """Milliseconds of CPU a sample takes in each stage."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.samples = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.spent[stage] = self.spent.get(stage, 0.0) + time.process_time() - start

    def told(self) -> dict[str, float]:
        return {name: round(1000 * seconds / self.samples, 4) for name, seconds in self.spent.items()}


def our_stages(shards: Path, size: int, batch: int, samples: int, seed: int) -> dict[str, float]:
    """The same work as `our_batches`, one stage after the other for each batch."""
    import torch

    from medclip_lab.data.augment import augment, crop_box
    from medclip_lab.data.decode import decode_image
    from medclip_lab.data.manifest import Manifest
    from medclip_lab.data.preprocess import Preprocess, normalise, stack
    from medclip_lab.data.quarantine import Quarantine
    from medclip_lab.data.reader import read_split

    config, tokenizer = _our_config(shards, size, batch), _tokenizer()
    preprocess = Preprocess(config.preprocess)
    studies = read_split(Manifest.load(shards), "train", Quarantine(samples, 0.0))
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    watch = Watch()
    while watch.samples < min(samples, STAGE_SAMPLES) // batch * batch:
        seeds = range(seed + watch.samples, seed + watch.samples + batch)
        with watch("read"):
            taken = list(islice(studies, batch))
        with watch("augment"):
            boxes = [crop_box(config.augment, seed) for seed in seeds]
        with watch("decode"):
            decoded = [
                decode_image(study.images[0][1], study.images[0][0], at_least=preprocess.at_least(box))
                for study, box in zip(taken, boxes, strict=True)
            ]
        with watch("geometry"):
            pixels = [preprocess(image, box) for image, box in zip(decoded, boxes, strict=True)]
        with watch("collate"):
            images = stack(pixels)
        with watch("augment"):
            augment(images, config.augment, seeds)
        with watch("to_float"):  # the model does this, on its device: not part of what the loader hands over
            normalise(images, mean, std)
        with watch("tokenize"):
            tokenizer([study.record["text"] for study in taken])
        watch.samples += batch
    return watch.told()


def their_stages(shards: Path, size: int, batch: int, samples: int, seed: int) -> dict[str, float]:
    """The same work as `their_batches`, one stage after the other for each batch."""
    import torch
    import webdataset as wds

    crop, convert, to_tensor, normalise = _their_transform(size).transforms
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    tars = wds.SimpleShardList([str(path) for path in sorted(shards.glob("*.tar"))])
    raw = iter(wds.DataPipeline(tars, wds.tarfile_to_samples()))
    decode = wds.decode("pilrgb")
    watch = Watch()
    while watch.samples < min(samples, STAGE_SAMPLES) // batch * batch:
        with watch("read"):
            taken = list(islice(raw, batch))
        with watch("decode"):
            decoded = list(decode(iter(taken)))
        images = [next(sample[name] for name in ("jpg", "png", "webp") if name in sample) for sample in decoded]
        with watch("geometry"):
            images = [convert(crop(image)) for image in images]
        with watch("to_float"):
            pixels = [normalise(to_tensor(image)) for image in images]
        with watch("tokenize"):
            texts = [tokenizer(sample["txt"])[0] for sample in decoded]
        with watch("collate"):
            torch.stack(pixels), torch.stack(texts)
        watch.samples += batch
    return watch.told()


if __name__ == "__main__":
    main()
