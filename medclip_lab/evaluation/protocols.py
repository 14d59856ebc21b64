"""Protocol files: which studies are read, what is asked of them and how it is scored: one name, one number."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medclip_lab.config import load_config, shipped
from medclip_lab.data.findings import PRESENT
from medclip_lab.errors import UserError
from medclip_lab.evaluation.labels_from import LABELS, LabelsFrom, Record
from medclip_lab.files import digest
from medclip_lab.inference.labelset import LabelPrompts, LabelSet, load_labelset, means_nothing

Task = Literal["multi_label", "exclusive", "class_retrieval", "report_retrieval"]


@dataclass
class Sampling:
    """A list of studies drawn by rule from the user's own copy."""

    labels: list[str]
    """The classes that are drawn."""
    per_label: int = 200
    rule: Literal["exclusive", "positive"] = "exclusive"
    """"exclusive": positive for one of the labels and for none of the others (uncertain and not mentioned count as
    absent, as the published lists were made); "positive": positive for the label, and drawn for no earlier one."""
    seed: int = 0
    """Studies are sorted by SHA-256 of "seed:study_id", and the first of each label are taken."""

    def __post_init__(self) -> None:
        if not self.labels or self.per_label < 1:
            raise ValueError("sampling: at least one label and one study a label are needed")


@dataclass
class ProtocolConfig:
    """One way to measure, as it stands in `configs/protocols/NAME.yaml`."""

    name: str
    task: Task
    """"multi_label": AUROC of each label; "exclusive": one class an image; "class_retrieval": images of a class by text
    and by image; "report_retrieval": the own report among all."""
    description: str = ""
    source: str = ""
    """The paper or repository whose protocol this is."""
    split: str = "test"
    views: list[str] = field(default_factory=list)
    """An image of one of these views is taken, the first; a study without is left out. Empty takes the first image."""
    labelset: str = "chexpert14"
    labels: list[str] = field(default_factory=list)
    """Those of the label set that are scored; empty takes all."""
    labels_from: str = LABELS
    """The field of the records, or the table, that tells them: see `LabelsFrom`."""
    positive_template: str = ""
    """Makes the prompts of "{}", the name in lower case, in place of those of the label set."""
    negative_template: str = ""
    score: str = ""
    """The rule of scoring; empty takes the one that fits the model. "exclusive" and "class_retrieval" know
    mean_embedding, mean_similarity and max_similarity."""
    sampling: Sampling | None = None
    ks: list[int] = field(default_factory=lambda: [5, 10, 100])
    """Of precision at K in "class_retrieval"."""
    queries_per_label: int = 10
    """Image queries of each class in "class_retrieval", drawn after the gallery by the same rule."""
    expected: dict[str, int] = field(default_factory=dict)
    """What the original list counts ("studies"); the result says where the data at hand differ."""
    notes: str = ""
    """What must be known to compare with published figures."""

    def __post_init__(self) -> None:
        if bool(self.positive_template) != bool(self.negative_template):
            raise ValueError("a protocol with templates needs positive_template and negative_template")
        if self.task == "class_retrieval" and self.sampling is None:
            raise ValueError("class_retrieval needs sampling: the classes of its gallery")

    def label_set(self) -> LabelSet:
        """The label set that is scored, with the protocol's own templates where it has some.

        Raises:
            UserError: a label that the set does not have, or one that the task cannot ask for.
        """
        whole = load_labelset(self.labelset)
        by_name = {label.name: label for label in whole.labels}
        wanted = self.labels or (self.sampling.labels if self.sampling else whole.names)
        for name in wanted:
            if name not in by_name:
                raise UserError(f"protocol {self.name}: label set {whole.name} has no {name!r}: {', '.join(by_name)}")
        labels = [by_name[name] for name in wanted]
        if self.positive_template:
            labels = [self._from_templates(label) for label in labels]
        if self.task in ("exclusive", "class_retrieval"):
            for label in labels:
                if not label.positive:
                    raise UserError(
                        f"protocol {self.name}: task {self.task} asks by positive prompts, and {label.name} of "
                        f"label set {whole.name} has none: give it prompts of its own, or leave it out with labels:"
                    )
        name = f"{whole.name} by {self.name}"
        try:
            return LabelSet(name, labels, self.description, exclusive=whole.exclusive)
        except ValueError as error:
            raise UserError(f"protocol {self.name}: {error}") from None

    def _from_templates(self, label: LabelPrompts) -> LabelPrompts:
        if means_nothing(label.name):
            return label  # "no no finding" asks the opposite of what it says
        name = label.name.lower()
        return LabelPrompts(label.name, [self.positive_template.format(name)], [self.negative_template.format(name)])


def load_protocol(name: str | Path) -> ProtocolConfig:
    """A protocol by file, or by the name of a shipped one ("chexpert_5x200").

    Raises:
        UserError: no such protocol, or one that is not well formed.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = shipped(f"protocols/{name}.yaml")
        if not re.fullmatch(r"[\w-]+", str(name)) or not path.exists():
            known = ", ".join(sorted(file.stem for file in shipped("protocols").glob("*.yaml")))
            raise UserError(f"protocol: neither a .yaml file nor the name of a shipped one: {str(name)!r} ({known})")
    return load_config(ProtocolConfig, path)


@dataclass(frozen=True)
class Selection:
    """The studies that a protocol takes of a split."""

    images: dict[str, int]
    """Study id to the number of its image."""
    classes: dict[str, str]
    """Study id to the class that it was drawn for; empty without sampling."""
    queries: dict[str, str]
    """The same for image queries, which are no part of the gallery."""
    hash: str
    """Of the list: two results compare only if it is equal."""
    left_out: dict[str, int]
    """Reasons and how many."""


def select(protocol: ProtocolConfig, records: Sequence[Record], listed: Sequence[str] | None = None) -> Selection:
    """The studies of a split that a protocol takes.

    Args:
        records: of the split, in any order.
        listed: ids of a list of the user's own; only these are taken.

    Raises:
        UserError: too few studies of a class, nothing left, or an id of the list that is not there.
    """
    left_out = {"no image of the views": 0}
    candidates: dict[str, tuple[int, Record]] = {}
    for record in records:
        number = _image_of(record, protocol.views)
        if number is None:
            left_out["no image of the views"] += 1
        else:
            candidates[record["study_id"]] = number, record
    if listed is not None:
        if missing := sorted(set(listed) - set(candidates)):
            raise UserError(f"list: {len(missing)} of {len(listed)} studies are not in split {protocol.split!r}")
        left_out["not in the list"] = len(candidates) - len(set(listed))
        candidates = {study: candidates[study] for study in listed}
    if not candidates:
        wanted = f" of the views {', '.join(protocol.views)}" if protocol.views else ""
        raise UserError(f"protocol {protocol.name}: split {protocol.split!r} has no images{wanted}")
    classes: dict[str, str] = {}
    queries: dict[str, str] = {}
    if protocol.sampling:
        # A field or table with a value for each image speaks of the one that is taken.
        taken = {study: {**record, "image": number} for study, (number, record) in candidates.items()}
        classes, queries = _drawn(protocol, protocol.sampling, taken)
        left_out["not drawn"] = len(candidates) - len(classes) - len(queries)
    kept = {**classes, **queries} if protocol.sampling else candidates
    images = {study: candidates[study][0] for study in kept}
    identity = digest([sorted(images.items()), sorted(classes.items()), sorted(queries.items())])
    return Selection(images, classes, queries, identity, {name: count for name, count in left_out.items() if count})


def _image_of(record: Record, views: Sequence[str]) -> int | None:
    if not views:
        return 0
    there = record.get("view") or []
    return next((number for number, view in enumerate(there) if view in views), None)


def _order(seed: int, study: str) -> str:
    return hashlib.sha256(f"{seed}:{study}".encode()).hexdigest()


def _drawn(
    protocol: ProtocolConfig, sampling: Sampling, records: Mapping[str, Record]
) -> tuple[dict[str, str], dict[str, str]]:
    """Study to class, of the gallery and of the image queries."""
    told = LabelsFrom(protocol.labels_from)
    wanted = sampling.labels
    positive = {
        study: [name for name, state in told.of(record, wanted).items() if state == PRESENT and name in wanted]
        for study, record in records.items()
    }
    ordered = sorted(positive, key=lambda study: _order(sampling.seed, study))
    extra = protocol.queries_per_label if protocol.task == "class_retrieval" else 0
    taken: dict[str, str] = {}
    queries: dict[str, str] = {}
    for name in sampling.labels:
        if sampling.rule == "exclusive":
            able = [study for study in ordered if positive[study] == [name]]
        else:
            able = [
                study for study in ordered if name in positive[study] and study not in taken and study not in queries
            ]
        if len(able) < sampling.per_label + extra:
            raise UserError(
                f"protocol {protocol.name}: {sampling.per_label + extra} studies of {name} ({sampling.rule}) are "
                f"needed, split {protocol.split!r} has {len(able)}"
            )
        taken |= dict.fromkeys(able[: sampling.per_label], name)
        queries |= dict.fromkeys(able[sampling.per_label : sampling.per_label + extra], name)
    return taken, queries
