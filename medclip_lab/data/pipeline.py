"""From shards to batches: which studies, which of their images and sentences, decoded, augmented, tokenized.

A batch is a dict: "image" uint8 [N, C, H, W], "text" int64 [M, L], "image_labels" [N, K] and
"text_labels" [M, K] (1, 0, -1, NaN for not mentioned), "image_id" and "text_id" (study ids of the rows) and
"patient_id" of the images; with `augment.views` 2 also "second_image", with `text.views` 2 "second_text". A modality
that a study lacks has no row: N and M may differ, and then rows are no pairs.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from medclip_lab.data.augment import AugmentConfig
from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.images import Images, Picture
from medclip_lab.data.manifest import Manifest, Shard
from medclip_lab.data.order import Place, Plan, Row, SourceOrder
from medclip_lab.data.preprocess import Preprocess, PreprocessConfig
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import BadSampleError, Reader, Study, labels_in
from medclip_lab.data.text import Rarity, TextConfig, draw_texts, whole_report
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.errors import UserError

Batch = dict[str, Any]
MAX_OPEN = 512


def open_files() -> int:
    """Shards that a loader process holds open, at most: half of what the system lets it."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:  # Windows
        return MAX_OPEN
    soft, _ = getrlimit(RLIMIT_NOFILE)
    return MAX_OPEN if soft < 0 else min(MAX_OPEN, soft // 2)


@dataclass
class SourceConfig:
    """One folder of shards."""

    shards: str
    """Folder with `manifest.json`, as `medclip-lab prepare` writes it, or a pattern of tars, "shards/{a,b}-*.tar"; of
    this machine or elsewhere: https://, s3://, gs://."""
    split: str = "train"
    """Or several, "train+val": once every setting is chosen, the validation patients may train too."""
    weight: float = 1.0
    """Share of each batch, relative to the other sources."""
    balance: float = 0.0
    """How much rare labels are favoured: a study is drawn as often as the commonest label, over its own rarest present
    one, to this power. 0 takes studies as they come, 1 gives all labels the same share. Sentences are chosen alike."""

    replacement: bool = False
    """Draw studies anew for each place of a window, so that some come twice in an epoch and some not at all."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf or not 0 <= self.balance <= 1:
            raise ValueError(f"weight must be positive and balance in [0, 1], got {self.weight} and {self.balance}")


@dataclass
class DataConfig:
    """What a run reads."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """By name. The first one sets the length of an epoch; the others go round at their own pace."""
    batch_size: int = 64
    """Studies of a global batch, over all ranks and sources: a run is the same on any number of ranks."""
    labels: list[str] = field(default_factory=lambda: list(CHEXPERT14))
    """Names of the label columns, in order."""
    text: TextConfig = field(default_factory=TextConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    scaled_decode: bool = True
    """In training a large JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that still covers `preprocess.size`;
    validation and bundles decode every pixel."""
    finish_on: Literal["loader", "device"] = "loader"
    """Where training images are made ready. "device" decodes JPEGs (nvJPEG, at their full size), resizes and augments
    where the towers are: for machines whose cores cannot keep up with their GPU. Wants the extra `decode`. Pixels are
    not those of a loader process to the bit."""
    shuffle_size: int = 10_000
    """Studies of a lane that are shuffled together."""
    lanes: int = 1
    """Stretches of an epoch that are read side by side, each for rows of its own; they divide the batch size. A rank
    reads from the shards of its own lanes only: on many ranks, take as many as the most there will be. `medclip-lab
    shards plan` shows what that means. Another number is another order."""
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
        if self.lanes < 1 or self.batch_size % self.lanes:
            raise ValueError(f"data.lanes must divide batch_size {self.batch_size}, got {self.lanes}")


def steps_per_epoch(config: DataConfig) -> int:
    """Batches in one pass over the first source, on any number of ranks.

    Raises:
        UserError: a source is missing or too small for one batch.
    """
    name = next(iter(config.sources))
    epochs = _epochs_per_batch(config)
    if epochs[name] > 1:
        raise UserError(
            f"data.sources.{name}: too few studies in split {config.sources[name].split!r} to fill a batch of "
            f"{config.batch_size}: lower data.batch_size"
        )
    return int(1 / epochs[name] + 1e-9)


def steps_once(config: DataConfig) -> int:
    """Batches until the first source is through; the last may be short, and have no row for some ranks."""
    return math.ceil(1 / max(_epochs_per_batch(config).values()) - 1e-9)


def _epochs_per_batch(config: DataConfig) -> dict[str, float]:
    """The part of each source that a batch takes."""
    total = sum(source.weight for source in config.sources.values())
    return {
        name: config.batch_size * source.weight / total / Manifest.load(source.shards).count(source.split)
        for name, source in config.sources.items()
    }


class BatchStream(IterableDataset[Batch]):
    """The batches `start` to `steps` of one rank, the same for any number of loader processes.

    What a row of a global batch is depends on the seed, the step and the number of the row alone: which study, which of
    its images and sentences, how it is augmented. Ranks and loader processes divide the work and change nothing.

    Args:
        training: random order, random views and sentences, augmentation, and in place of a sample that cannot be used
            the next one, so that every batch is whole; else the first of each, in shard order, and bad ones left out.
        teacher_tokenizer: reads the same texts for a teacher, "teacher_text" in the batch.

    Raises:
        UserError: a source is missing, or too small for its lanes; fewer rows than ranks.
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
        teacher_tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.teacher_tokenizer = teacher_tokenizer
        self.config, self.tokenizer, self.training = config, tokenizer, training
        self.steps, self.start, self.seed = steps, start, seed
        self.rank, self.world_size = rank, world_size
        if config.batch_size < world_size:
            raise UserError(f"data.batch_size is {config.batch_size}: {world_size} ranks need a row each")
        self.images = Images(
            Preprocess(config.preprocess),
            config.augment,
            training=training,
            scaled=config.scaled_decode,
            on_device=config.finish_on == "device",
        )
        manifests = {name: Manifest.load(source.shards) for name, source in config.sources.items()}
        self.shards: dict[str, tuple[Shard, ...]] = {
            name: manifests[name].of_split(source.split) for name, source in config.sources.items()
        }
        self.quarantines = {
            name: Quarantine(sum(shard.samples for shard in shards), config.max_bad, quarantine_path, name)
            for name, shards in self.shards.items()
        }
        self.rarity = {
            name: rarity_of(manifests[name], source.balance)
            for name, source in config.sources.items()
            if source.balance and training
        }
        orders = {name: self._order(name) for name in self.shards}
        weights = [source.weight for source in config.sources.values()]
        self.plan = Plan(orders, weights, config.batch_size, seed, once=not training)

    def _order(self, name: str) -> SourceOrder:
        shards, source = self.shards[name], self.config.sources[name]
        weights = None
        if name in self.rarity:
            quarantine = Quarantine(sum(shard.samples for shard in shards), 1.0)  # the ceiling is for what is read
            rarity = self.rarity[name]
            weights = [
                np.array([copies(labels, rarity) for labels in labels_in(shard, quarantine)]) for shard in shards
            ]
        counts = [shard.samples for shard in shards]
        window = self.config.shuffle_size if self.training else 0
        lanes = self.config.lanes if self.training else 1
        try:
            return SourceOrder(counts, name, self.seed, lanes, window, source.replacement and self.training, weights)
        except ValueError as error:
            raise UserError(f"data.sources.{name}: {error}: lower data.lanes") from None

    def __len__(self) -> int:
        # Of the whole run: Lightning counts the batches before a resume too, and ends an epoch by this length.
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for quarantine in self.quarantines.values():
            quarantine.share = 1 / (workers * self.world_size)
        readers = {
            name: Reader(shards, self.quarantines[name], self._open_shards(name))
            for name, shards in self.shards.items()
        }
        try:
            for step in range(self.start + worker, self.steps, workers):
                yield self.batch(self.plan.rows(step, self.rank, self.world_size), step, readers)
        finally:
            for reader in readers.values():
                reader.close()

    def _open_shards(self, name: str) -> int:
        """As many as the windows of this rank's lanes meet, and those of the next."""
        order, lanes = self.plan.orders[name], self.plan.lanes_of(self.rank, self.world_size)
        met = sum(len(order.shards_of(0, lane, 0)) + 1 for lane in lanes)
        return min(max(2 * met, 16), max(open_files() // len(self.shards), 2))

    def batch(self, rows: list[Row], step: int, readers: dict[str, Reader]) -> Batch:
        """Read, decode, augment and tokenize the rows of a step that are this rank's."""
        images: list[list[Picture]] = []  # of each study its views
        image_labels, image_ids, patients = [], [], []
        texts, text_labels, text_ids = [], [], []  # of each text its views
        for row in rows:
            chance = random.Random(f"row {self.seed} {step} {row.number}")
            for study in self._studies(row, step, readers):
                if not study.images:
                    break
                views = self.images.views(study, row.source, chance, self.quarantines[row.source])
                if views:
                    images.append(views)
                    image_labels.append(self._vector(study.record.get("labels") or {}))
                    image_ids.append(study.record["study_id"])
                    patients.append(study.record["patient_id"])
                    break
            else:
                continue  # nothing usable stands here; its text alone would shift every later pair by a row
            if self.training:
                drawn = draw_texts(study.record, self.config.text, chance, self.rarity.get(row.source))
            else:
                drawn = [whole_report(study.record, self.config.text)] * self.config.text.views
            if drawn[0][0]:
                texts.append([text for text, _ in drawn])
                text_labels.append(self._vector(drawn[0][1]))
                text_ids.append(study.record["study_id"])
        if self.config.control == "shuffled_pairs":
            # A shift by a random amount: no text keeps its own image, and each is still used once.
            shift = random.Random(f"pairs {self.seed} {step}").randrange(1, max(len(texts), 2))
            texts, text_labels = texts[shift:] + texts[:shift], text_labels[shift:] + text_labels[:shift]
        batch: Batch = {"image_id": image_ids, "text_id": text_ids, "patient_id": patients}
        if images:
            columns = zip(("image", "second_image"), zip(*images, strict=True), strict=False)
            batch |= {name: self.images.together(view) for name, view in columns}
            batch["image_labels"] = torch.tensor(image_labels)
        if texts:
            if self.teacher_tokenizer is not None:
                batch["teacher_text"] = self.teacher_tokenizer([text for text, *_ in texts])
            views_of_text = zip(("text", "second_text"), zip(*texts, strict=True), strict=False)
            batch |= {name: self.tokenizer(list(view)) for name, view in views_of_text}
            batch["text_labels"] = torch.tensor(text_labels)
        if not (images or texts or self.training) and self.world_size > 1:
            batch |= self._no_rows()
        return batch

    def _no_rows(self) -> Batch:
        """What a rank has of a last batch that is shorter than the ranks: it must still meet the others."""
        size, labels = self.config.preprocess.size, len(self.config.labels)
        ids = self.tokenizer([""])[:0]
        views = ("text", "second_text")[: self.config.text.views]
        teacher = {} if self.teacher_tokenizer is None else {"teacher_text": self.teacher_tokenizer([""])[:0]}
        return teacher | {
            "image": torch.zeros(0, 3, size, size, dtype=torch.uint8),
            "image_labels": torch.zeros(0, labels),
            **dict.fromkeys(views, ids),
            "text_labels": torch.zeros(0, labels),
        }

    def finish(self, batch: Batch, device: torch.device) -> Batch:
        """The batch with its images' pixels on `device`, if a loader process left them to it; see `Images.finish`."""
        return self.images.finish(batch, device, self.quarantines)

    def _studies(self, row: Row, step: int, readers: dict[str, Reader]) -> Iterator[Study]:
        """The study of a row; in training then those that stand in for it, one after the other, if it is bad."""
        shards, quarantine = self.shards[row.source], self.quarantines[row.source]
        quarantine.seen += 1
        unreadable: set[int] = set()
        chance = random.Random(f"stand-in {self.seed} {step} {row.number}")
        for place in _onwards(row.place, shards, chance) if self.training else [row.place]:
            if place.shard in unreadable:
                continue
            try:
                yield readers[row.source].study(*place)
            except BadSampleError as error:
                quarantine.add(shards[place.shard].name, error.key, *error.fault, number=place.sample)
                if error.fault.cause == "unreadable shard":
                    unreadable.add(place.shard)

    def _vector(self, labels: dict[str, int | None]) -> list[float]:
        values = (labels.get(name) for name in self.config.labels)
        return [math.nan if value is None else float(value) for value in values]


def _onwards(place: Place, shards: Sequence[Shard], chance: random.Random) -> Iterator[Place]:
    """A place and all others: first those of its shard, then those of the shards that follow, in an order of its own.

    In one order for all rows, whatever follows a gap would stand in for all of it.
    """
    for turn in range(len(shards)):
        shard = (place.shard + turn) % len(shards)
        many = shards[shard].samples
        if not many:
            continue
        first = place.sample if turn == 0 else chance.randrange(many)
        stride = chance.randrange(1, many + 1)
        while math.gcd(stride, many) > 1:  # else it would not meet all
            stride = chance.randrange(1, many + 1)
        yield from (Place(shard, (first + number * stride) % many) for number in range(many))


def rarity_of(manifest: Manifest, balance: float) -> Rarity:
    """(count of the commonest / count of this) to the power of `balance`, for each label and state of a manifest."""
    counts = {
        (name, int(state)): count
        for name, states in manifest.facts.get("labels", {}).items()
        for state, count in states.items()
        if state != "null" and count
    }
    commonest = max(counts.values(), default=1)
    return {item: (commonest / count) ** balance for item, count in counts.items()}


def copies(labels: dict[str, int], rarity: Rarity) -> float:
    """How often a study comes in an epoch: as often as its rarest present label asks for."""
    return max((rarity.get((label, 1), 1.0) for label, state in labels.items() if state == 1), default=1.0)


def loader(stream: BatchStream) -> DataLoader[Batch]:
    """A DataLoader that hands on the stream's batches as they are."""
    workers = stream.config.workers
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0 and stream.training,
        generator=torch.Generator(),  # else each pass would take a number from those of the model's dropout
    )
