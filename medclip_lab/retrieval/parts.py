"""The batches of one shard, decoded and tokenized, for loader processes to make ahead of the model.

A batch is a fixed stretch of a shard's studies, with all that is usable of them: what stands in it depends neither on
the number of loader processes nor on where an earlier call broke off, so that its embeddings are the same to the bit.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.manifest import Shard
from medclip_lab.data.preprocess import Preprocess, stack
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import BadSampleError, Reader, Study
from medclip_lab.data.report import split_sentences
from medclip_lab.data.tokenizer import Tokenizer
from medclip_lab.errors import UserError
from medclip_lab.retrieval.embeddings import KEPT, MODALITIES

Texts = Literal["report", "sentences", "sections"]
TEXTS: tuple[Texts, ...] = ("report", "sentences", "sections")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """What of the studies is embedded, and how."""

    modalities: tuple[str, ...] = MODALITIES
    texts: Texts = "report"
    """"report" is the text of a study as a whole, "sentences" and "sections" are rows of their own."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the files; half the bytes cost about 0.0005 of a cosine."""
    batch_size: int = 64
    """Studies in a batch. Another number may change the last bits of an embedding, and so is another folder."""
    include_text: bool = False
    """Keep the texts in the tables. Embeddings and texts are as private as the reports."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.modalities if name not in MODALITIES]
        if unknown or not self.modalities:
            raise UserError(f"embed: modalities are {' and '.join(MODALITIES)}, got {', '.join(self.modalities)!r}")
        if self.texts not in TEXTS or self.dtype not in ("float32", "float16"):
            raise UserError(f"embed: no texts {self.texts!r} or dtype {self.dtype!r}")
        if self.batch_size < 1:
            raise UserError(f"embed: batch-size must be at least 1, got {self.batch_size}")


@dataclass
class Part:
    """A batch: what the towers want, what its rows are, and what became of everything that stood there."""

    pixels: Tensor | None = None
    """uint8 [N, C, H, W]."""
    tokens: Tensor | None = None
    """int64 [M, L]."""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in MODALITIES})
    status: list[dict[str, Any]] = field(default_factory=list)


def text_key(text: str) -> int:
    """Equal for texts of the same words, whatever their case, blanks and punctuation."""
    words = " ".join(re.findall(r"\w+", text.lower()))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big", signed=True)


class ShardParts(Dataset[Part]):
    """The batches of a shard by number."""

    def __init__(self, shard: Shard, preprocess: Preprocess, tokenizer: Tokenizer, config: EmbedConfig) -> None:
        self.shard, self.preprocess, self.tokenizer, self.config = shard, preprocess, tokenizer, config
        self._reader: Reader | None = None

    def __len__(self) -> int:
        return -(-self.shard.samples // self.config.batch_size)

    def __getitem__(self, number: int) -> Part:
        if self._reader is None:  # in the process that reads
            self._reader = Reader([self.shard], Quarantine(self.shard.samples, 1.0), limit=1)
        part = Part()
        images: list[Tensor] = []
        texts: list[str] = []
        if number == 0:
            part.status += [_status(-1, "", "", None, *fault) for fault in self._reader.faults(0)]
        first = number * self.config.batch_size
        for place in range(first, min(first + self.config.batch_size, self.shard.samples)):
            try:
                study = self._reader.study(0, place)
            except BadSampleError as error:
                part.status.append(_status(place, error.key, "", None, *error.fault))
                continue
            facts = _facts(study)
            if "image" in self.config.modalities:
                images += self._images(study, facts, part)
            if "text" in self.config.modalities:
                for name, text in texts_of(study.record, self.config.texts):
                    texts.append(text)
                    kept = {"text": text} if self.config.include_text else {}
                    part.rows["text"].append(facts | {"part": name, "text_key": text_key(text)} | kept)
                    part.status.append(_status(place, study.key, "text", name))
        if images:
            part.pixels = stack(images)
        if texts:
            part.tokens = self.tokenizer(texts)
        return part

    def _images(self, study: Study, facts: dict[str, Any], part: Part) -> Iterator[Tensor]:
        views = study.record.get("view") or []
        kept = {"text": study.record.get("text") or ""} if self.config.include_text else {}
        for number, (suffix, data) in enumerate(study.images):
            try:
                pixels = self.preprocess(decode_image(data, suffix))
            except DecodeError as error:
                part.status.append(
                    _status(study.number, study.key, "image", str(number), "unreadable image", str(error))
                )
                continue
            view = views[number] if number < len(views) else None
            part.rows["image"].append(facts | {"image": number, "view": view} | kept)
            part.status.append(_status(study.number, study.key, "image", str(number)))
            yield pixels


def _status(
    number: int, key: str, modality: str, part: str | None, status: str = "ok", reason: str = ""
) -> dict[str, Any]:
    return {"number": number, "key": key, "modality": modality, "part": part, "status": status, "reason": reason}


def _facts(study: Study) -> dict[str, Any]:
    record = study.record
    facts = {name: None if record.get(name) is None else str(record[name]) for name in KEPT}
    labels = {name: int(value) for name, value in (record.get("labels") or {}).items() if value is not None}
    return facts | {"labels": list(labels.items())}


def texts_of(record: dict[str, Any], texts: Texts) -> list[tuple[str | None, str]]:
    """(name, text) of what is embedded of a study's report; the name is a section's, or the number of a sentence."""
    whole = record.get("text") or ""
    if texts == "report":
        return [(None, whole)] if whole else []
    if texts == "sections":
        return [(name, text) for name, text in (record.get("sections") or {}).items() if text]
    sentences = [part["text"] for part in record.get("sentences") or []] or split_sentences(whole)
    return [(str(number), sentence) for number, sentence in enumerate(sentences) if sentence]
