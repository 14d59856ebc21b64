"""From shards to batches: which studies, which of their images and sentences, decoded, augmented, tokenized.

A batch is a dict: "image" uint8 [N, C, H, W], "text" int64 [M, L], "image_labels" [N, K] and
"text_labels" [M, K] (1, 0, -1, NaN for not mentioned), "image_id" and "text_id" (study ids of the rows) and
"patient_id" of the images. A modality that a study lacks has no row: N and M may differ, and then rows are no pairs.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import _shuffle as shuffle_buffer

from medclip_lab.data.augment import AugmentConfig, augment, crop_box
from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.order import epoch_of_studies, samples_per_rank
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig, stack
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.shards import Manifest, Shard
from medclip_lab.data.text import Rarity, TextConfig, draw_text
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.errors import UserError

Batch = dict[str, Any]


@dataclass
class SourceConfig:
    """One folder of shards."""

    shards: str
    """Folder with `manifest.json`, as `medclip-lab prepare` writes it."""
    split: str = "train"
    """Or several, "train+val": once every setting is chosen, the validation patients may train too."""
    weight: float = 1.0
    """Share of each batch, relative to the other sources."""
    balance: float = 0.0
    """How much rare labels are favoured: a study is drawn as often as the commonest label, over its own rarest present
    one, to this power. 0 takes studies as they come, 1 gives all labels the same share. Sentences are chosen alike."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or not 0 <= self.balance <= 1:
            raise ValueError(f"weight must be positive and balance in [0, 1], got {self.weight} and {self.balance}")


@dataclass
class DataConfig:
    """What a run reads."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """By name. The first one sets the length of an epoch; the others go round at their own pace."""
    batch_size: int = 64
    """Studies of a batch on each rank, over all sources."""
    labels: list[str] = field(default_factory=lambda: list(CHEXPERT14))
    """Names of the label columns, in order."""
    text: TextConfig = field(default_factory=TextConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    scaled_decode: bool = True
    """In training a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that still covers `preprocess.size`;
    validation and bundles decode every pixel."""
    shuffle_size: int = 2048
    """Studies in the buffer that mixes shards."""
    workers: int = 1
    """Loader processes of each rank; 0 decodes in the training process. The order does not depend on it."""
    max_bad: float = 0.01
    """Largest share of unusable samples before the run stops."""
    control: Literal["none", "shuffled_pairs"] = "none"
    """"shuffled_pairs" gives every image the text and labels of another study of its batch: the control that must
    learn nothing."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data.sources: name at least one source")
        if self.workers < 0 or self.shuffle_size < 1 or not 0 <= self.max_bad <= 1:
            raise ValueError(
                "data: workers cannot be negative, shuffle_size must be at least 1 and max_bad a share, got "
                f"{self.workers}, {self.shuffle_size} and {self.max_bad}"
            )
        if self.batch_size < 2:
            raise ValueError(f"data.batch_size must be at least 2, got {self.batch_size}")

    def shares(self) -> dict[str, int]:
        """Studies of each source in a batch, by largest remainder."""
        total = sum(source.weight for source in self.sources.values())
        exact = {name: self.batch_size * source.weight / total for name, source in self.sources.items()}
        shares = {name: math.floor(value) for name, value in exact.items()}
        for name in sorted(exact, key=lambda name: shares[name] - exact[name])[
            : self.batch_size - sum(shares.values())
        ]:
            shares[name] += 1
        if min(shares.values()) == 0:
            raise UserError(f"data: batch_size {self.batch_size} is too small to hold a study of every source")
        return shares


def steps_per_epoch(config: DataConfig, world_size: int, seed: int) -> int:
    """Batches in one pass over the first source.

    Raises:
        UserError: a source is missing or too small for one batch.
    """
    name, source = next(iter(config.sources.items()))
    shards = Manifest.load(source.shards).of_split(source.split)
    available, share = samples_per_rank(shards, 0, world_size, seed), config.shares()[name]
    if available < share:
        raise UserError(
            f"data.sources.{name}: {available} studies a rank in split {source.split!r} do not fill a batch of "
            f"{share}: lower data.batch_size"
        )
    return available // share


class BatchStream(IterableDataset[Batch]):
    """The batches `start` to `steps` of one rank, the same for any number of loader processes.

    Every loader process reads all studies of the rank and decodes its own batches only: reading is cheap, and so the
    order is the same whoever does the work.

    Args:
        training: random order, random views and sentences, augmentation; else the first of each, in shard order.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        steps: int,
        *,
        start: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        training: bool = True,
        quarantine_path: Path | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.steps = steps
        self.start = start
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.training = training
        self.shares = config.shares()
        self.preprocess = Preprocess(config.preprocess)
        self.shards: dict[str, tuple[Shard, ...]] = {
            name: Manifest.load(source.shards).of_split(source.split) for name, source in config.sources.items()
        }
        total = sum(shard.samples for shards in self.shards.values() for shard in shards)
        self.quarantine = Quarantine(total, config.max_bad, quarantine_path)
        self.rarity = {
            name: _rarity(Manifest.load(source.shards), source.balance)
            for name, source in config.sources.items()
            if source.balance
        }

    def __len__(self) -> int:
        # Of the whole run: Lightning counts the batches before a resume too, and ends an epoch by this length.
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        streams = {name: self._studies(name) for name in self.shards}
        # A source's own cursor, not one queue, so that each batch has the share of each source exactly.
        for step in range(self.steps):
            studies = [study for name, stream in streams.items() for study in _take(stream, self.shares[name])]
            mine = step >= self.start and (step - self.start) % workers == worker
            if mine and studies:
                yield self.batch(studies, step)

    def _studies(self, name: str) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            size = self.config.shuffle_size if self.training else 0
            studies = epoch_of_studies(
                self.shards[name], epoch, self.rank, self.world_size, self.seed, self.quarantine, size
            )
            if not self.training:
                yield from studies
                return
            yield from self._balanced(name, studies, epoch) if name in self.rarity else studies
            epoch += 1

    def _balanced(self, name: str, studies: Iterator[dict[str, Any]], epoch: int) -> Iterator[dict[str, Any]]:
        """Studies with rare labels several times, mixed again so that their copies do not follow each other."""
        chance = random.Random(f"balance {name} {self.seed} {self.rank} {epoch}")
        rarity = self.rarity[name]

        def copies() -> Iterator[dict[str, Any]]:
            for study in studies:
                labels = study["json"].get("labels") or {}
                times = max((rarity[label, 1] for label, value in labels.items() if value == 1), default=1.0)
                for _ in range(int(times) + (chance.random() < times % 1)):
                    yield study | {"rarity": rarity}

        size = self.config.shuffle_size
        yield from shuffle_buffer(copies(), bufsize=size, initial=size, rng=chance)

    def batch(self, studies: list[dict[str, Any]], step: int) -> Batch:
        """Decode, augment and tokenize the studies of a step; unusable images are quarantined and left out."""
        chance = random.Random(f"batch {self.seed} {self.rank} {step}")
        changes = random.Random(f"augment {self.seed} {self.rank} {step}")
        images: list[Tensor] = []
        seeds: list[int] = []
        image_labels, image_ids, patients = [], [], []
        texts, text_labels, text_ids = [], [], []
        for study in studies:
            record = study["json"]
            if study["images"]:
                suffix, data = chance.choice(study["images"]) if self.training else study["images"][0]
                try:
                    images.append(self._image(data, suffix, seed := changes.getrandbits(63)))
                except DecodeError as error:
                    self.quarantine.add(study["__shard__"], study["__key__"], "unreadable image", str(error))
                    continue  # without its image the text would shift every later pair by a row
                seeds.append(seed)
                image_labels.append(self._vector(record.get("labels") or {}))
                image_ids.append(record["study_id"])
                patients.append(record["patient_id"])
            if self.training:
                text, labels = draw_text(record, self.config.text, chance, study.get("rarity"))
            else:
                text, labels = record.get("text") or "", record.get("labels") or {}
            if text:
                texts.append(text)
                text_labels.append(self._vector(labels))
                text_ids.append(record["study_id"])
        if self.config.control == "shuffled_pairs":
            # A shift by a random amount: no text keeps its own image, and each is still used once.
            shift = chance.randrange(1, max(len(texts), 2))
            texts, text_labels = texts[shift:] + texts[:shift], text_labels[shift:] + text_labels[:shift]
        batch: Batch = {"image_id": image_ids, "text_id": text_ids, "patient_id": patients}
        if images:
            pixels = stack(images)
            if self.training:
                pixels = augment(pixels, self.config.augment, seeds)
            batch |= {"image": pixels, "image_labels": torch.tensor(image_labels)}
        if texts:
            batch |= {"text": self.tokenizer(texts), "text_labels": torch.tensor(text_labels)}
        return batch

    def _image(self, data: bytes, suffix: str, seed: int) -> Tensor:
        if not self.training:
            return self.preprocess(decode_image(data, suffix))
        box = crop_box(self.config.augment, seed)
        at_least = self.preprocess.at_least(box) if self.config.scaled_decode else None
        return self.preprocess(decode_image(data, suffix, at_least=at_least), box)

    def _vector(self, labels: dict[str, int | None]) -> list[float]:
        values = (labels.get(name) for name in self.config.labels)
        return [math.nan if value is None else float(value) for value in values]


def _take(stream: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    for _ in range(number):
        study = next(stream, None)
        if study is None:
            return
        yield study


def _rarity(manifest: Manifest, balance: float) -> Rarity:
    """(count of the commonest / count of this) to the power of `balance`, for each label and state of a manifest."""
    counts = {
        (name, int(state)): count
        for name, states in manifest.facts.get("labels", {}).items()
        for state, count in states.items()
        if state != "null"
    }
    commonest = max(counts.values(), default=1)
    return {item: (commonest / count) ** balance for item, count in counts.items()}


def loader(stream: BatchStream) -> DataLoader[Batch]:
    """A DataLoader that hands on the stream's batches as they are."""
    workers = stream.config.workers
    return DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0 and stream.training)
