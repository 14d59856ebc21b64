"""What a page shows: plain values, in the order in which they appear."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

LabelState = Literal["present", "absent", "uncertain", "unmentioned"]
Match = Literal["own", "shared", "none"]
STATES: tuple[LabelState, ...] = ("present", "absent", "uncertain", "unmentioned")
SECTIONS = ("data", "training", "classification", "retrieval", "map", "making")
MODEL = "model"  # the condition of a RetrievalScore that is no control


def label_state(value: int | None) -> LabelState:
    """The name of a label value: 1 present, 0 absent, -1 uncertain, None unmentioned."""
    names: dict[int | None, LabelState] = {1: "present", 0: "absent", -1: "uncertain", None: "unmentioned"}
    return names[value]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A headline figure; what stands in brackets at the end of `value` is set smaller."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """The size of one split."""

    split: str
    studies: int
    images: int
    patients: int


@dataclass(frozen=True, kw_only=True)
class LabelCounts:
    """How many studies have each state of one finding."""

    finding: str
    present: int
    absent: int
    uncertain: int = 0
    unmentioned: int = 0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with its report for the gallery; `image` is PNG (or any format Pillow reads)."""

    image: bytes
    text: str
    labels: Mapping[str, LabelState] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """A series of (step, loss); points that are not finite are left out and counted on the page."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class FindingScore:
    """AUROC of one finding, with its 95 % interval and the controls' AUROC. Without a value, `reason` says why."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    positives: int | None = None
    negatives: int | None = None
    controls: Mapping[str, float | None] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RetrievalScore:
    """Retrieval in one direction under one condition: `MODEL`, or the name of a control. Shares are in 0..1."""

    direction: str
    condition: str = MODEL
    recall: Mapping[int, float]
    chance: Mapping[int, float] = field(default_factory=dict)
    interval: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    median_rank: float | None = None
    chance_median_rank: float | None = None
    count: int


@dataclass(frozen=True, kw_only=True)
class ImageHit:
    """An image found for a text; `match`: the query's own study, one that shares its findings, or neither."""

    image: bytes
    score: float
    caption: str = ""
    match: Match = "none"


@dataclass(frozen=True, kw_only=True)
class TextQuery:
    """A text and the images found for it, best first."""

    query: str
    hits: Sequence[ImageHit]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TextHit:
    """A report text found for an image."""

    text: str
    score: float
    match: Match = "none"


@dataclass(frozen=True, kw_only=True)
class ImageQuery:
    """An image and the report texts found for it, best first."""

    image: bytes
    hits: Sequence[TextHit]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How one image scores for one finding: the share (0..1) of images that score lower; and what the report says."""

    finding: str
    score: float
    state: LabelState = "unmentioned"


@dataclass(frozen=True, kw_only=True)
class ClassifiedImage:
    """An image and how it scores for each finding."""

    image: bytes
    predictions: Sequence[Prediction]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class MapPoint:
    """An embedding in two dimensions."""

    x: float
    y: float
    group: str
    modality: Literal["image", "text"]
    tooltip: str = ""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a step took; `reused` where it was found done already."""

    step: str
    seconds: float
    reused: bool = False


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command a reader can copy to repeat a step."""

    step: str
    command: str


@dataclass(frozen=True, kw_only=True)
class PageData:
    """All that the page can show; what is empty is left out.

    `remarks` adds a sentence of the caller's under the heading of a section of `SECTIONS`. `notes` stand at the top:
    the first thing a stranger must know.
    """

    title: str
    lede: str = ""
    version: str = ""
    created: str = ""
    command: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    remarks: Mapping[str, str] = field(default_factory=dict)
    headline: Sequence[Tile] = ()
    splits: Sequence[SplitCounts] = ()
    label_counts: Sequence[LabelCounts] = ()
    samples: Sequence[Sample] = ()
    loss_curves: Sequence[LossCurve] = ()
    auroc_macro: FindingScore | None = None
    auroc: Sequence[FindingScore] = ()
    retrieval: Sequence[RetrievalScore] = ()
    text_queries: Sequence[TextQuery] = ()
    image_queries: Sequence[ImageQuery] = ()
    classified: Sequence[ClassifiedImage] = ()
    embedding_map: Sequence[MapPoint] = ()
    timings: Sequence[Timing] = ()
    commands: Sequence[Command] = ()

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.remarks) - set(SECTIONS)):
            raise ValueError(f"remarks: no section is named {unknown[0]!r}; sections: {', '.join(SECTIONS)}")
