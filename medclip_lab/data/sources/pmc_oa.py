"""PMC-OA (Lin et al., MICCAI 2023) and Open-PMC (Baghbanzadeh et al., 2025): figures of open-access articles.

Layout: JSON lines with "image" (a file name) and "caption", as `{train,valid,test}.jsonl` or one `pmc_oa.jsonl`, and
the images in `images/`, in `caption_T060_filtered_top4_sep_v0_subfigures/`, or in the one inside the other.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.tables import figure_sample, find_image, read_images
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

_FILES = {"train.jsonl": "train", "valid.jsonl": "val", "test.jsonl": "test", "pmc_oa.jsonl": ""}
_SUBFIGURES = "caption_T060_filtered_top4_sep_v0_subfigures"
_ARTICLE = re.compile(r"PMC\d+", re.IGNORECASE)


@dataclass(frozen=True)
class PmcOa:
    """An image with all its captions is a study; its article, by the PMC number in its name, stands for the patient.

    Splits are those of the files, except that an article whose figures lie in several goes to the last of train, val,
    test that has one; `pmc_oa.jsonl` is cut 80/10/10 by a hash of the article. No rules of ours read captions.
    """

    folder: Path = field(metadata={"help": "the folder with train.jsonl, valid.jsonl and test.jsonl, or pmc_oa.jsonl"})

    name = "pmc-oa"
    license = "each figure as its article in PMC Open Access"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        files = [(folder / name, split) for name, split in _FILES.items() if (folder / name).is_file()]
        if not files:
            raise UserError(f"{self.name}: none of {', '.join(_FILES)} in {folder}")
        captions: dict[str, list[str]] = {}
        split_of: dict[str, str] = {}
        for path, split in files:
            for image, text in _lines(path):
                article = article_of(image)
                split_of[article] = split or split_of.get(article) or split_by_hash(article)
                texts = captions.setdefault(image, [])
                if text not in texts:
                    texts.append(text)
        return [
            Record(
                study_id=f"pmc-{image}",
                patient_id=(article := article_of(image)),
                split=split_of[article],
                content=(image, "\n".join(texts)),
            )
            for image, texts in captions.items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        image, text = record.content
        folder = self.folder.expanduser()
        roots = [folder / "images", folder / _SUBFIGURES, folder / "images" / _SUBFIGURES, folder]
        found = read_images([find_image(roots, image)], note)
        return figure_sample(self, record, found, text, note)


@dataclass(frozen=True)
class OpenPmc(PmcOa):
    __doc__ = PmcOa.__doc__
    name = "open-pmc"


def article_of(name: str) -> str:
    """The article a file name tells, as `pmc123`; the name itself where it tells none."""
    match = _ARTICLE.search(name)
    return match[0].lower() if match else name


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                row = json.loads(data)
                image, text = row["image"], row.get("caption")
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f"{path}, line {line}: no JSON object with an image") from None
            if not isinstance(image, str) or not isinstance(text, str | None):
                raise UserError(f"{path}, line {line}: image and caption must be texts")
            yield image, text or ""
