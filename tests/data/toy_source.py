"""A source with faults on demand; it stands apart so that worker processes import it without a test's own imports."""

import io
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record

SPLITS = ("train", "train", "train", "val", "test")


def picture(number: int, side: int = 96) -> Image.Image:
    """Smooth and full of detail, as unlike that of any other number as radiographs are unlike each other."""
    field = np.random.default_rng(number).random((20, 20))
    return Image.fromarray((field * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@dataclass(frozen=True)
class Toy:
    """Study n is of patient n // 2 and has picture n, but for those that are named."""

    studies: int = field(default=60, metadata={"help": "number of studies", "example": "60"})
    broken: tuple[int, ...] = field(default=(), metadata={"help": "studies that cannot be used"})
    remarked: tuple[int, ...] = field(default=(), metadata={"help": "studies that lack something, 100 % usable"})
    copies: tuple[str, ...] = field(default=(), metadata={"help": "n:m, study n has the image of m"})
    alike: tuple[str, ...] = field(default=(), metadata={"help": "n:m, study n has the image of m as a small JPEG"})
    same_text: tuple[str, ...] = field(default=(), metadata={"help": "n:m, study n has the report of m"})
    slow: float = field(default=0.0, metadata={"help": "seconds a study"})
    log: Path | None = field(default=None, metadata={"help": "file that gets a line for each study that is read"})

    name = "toy"
    license = "CC0-1.0"

    def records(self) -> list[Record]:
        return [
            Record(study_id=f"s{n}", patient_id=f"p{n // 2}", split=SPLITS[n // 2 % 5], content=n)
            for n in range(self.studies)
        ]

    def read(self, record: Record, note: Note) -> Sample:
        number = record.content
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
        time.sleep(self.slow)
        if number in self.broken:
            raise BadStudyError("unreadable image", "cut short")
        if number in self.remarked:
            note("missing report", "no text file of this study")
        images = [("png", encoded(picture(_source(self.copies, number))))]
        if (original := _source(self.alike, number)) != number:
            images = [("jpg", encoded(picture(original).resize((80, 80)), "JPEG", quality=60))]
        text = f"Case {_source(self.same_text, number)}: small effusion."
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=images,
            view=["PA"],
            text=text,
            labels={"Pleural Effusion": 1, "Edema": number % 2},
            source=self.name,
            license=self.license,
        )


def _source(pairs: tuple[str, ...], number: int) -> int:
    return dict(map(int, pair.split(":")) for pair in pairs).get(number, number)


@dataclass(frozen=True)
class Given(Toy):
    """The records it is given, whatever is wrong with them."""

    given: tuple[Record, ...] = ()

    def records(self) -> list[Record]:
        return list(self.given)


@dataclass(frozen=True)
class Failing(Toy):
    """Study 7 ends the process, or cannot be reached."""

    error: str = ""

    def read(self, record: Record, note: Note) -> Sample:
        if record.content == 7:
            if self.error == "death":
                os._exit(9)
            raise OSError(5, self.error)
        return super().read(record, note)
