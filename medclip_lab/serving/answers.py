"""What is answered, as the OpenAPI document promises it."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """Whatever is not promised is not there."""

    model_config = ConfigDict(extra="forbid")


class ProblemOut(Answer):
    """RFC 9457: what is wrong and what to change."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None


class ModelHashes(Answer):
    """What decides an embedding; answers of another fingerprint do not compare."""

    name: str
    fingerprint: str
    weights: str
    preprocess: str


class LabelSetOut(Answer):
    """Which labels, and a hash of their names and prompts."""

    name: str
    hash: str


class Timings(Answer):
    """Milliseconds by stage; several inputs of one request go through the same stage together."""

    receive: float
    decode: float
    queue: float
    model: float
    search: float
    total: float


class Envelope(Answer):
    """With every answer."""

    request_id: str
    model: ModelHashes
    timings_ms: Timings


class Finding(Answer):
    """One label of one image."""

    label: str
    score: float
    probability: float | None
    """None unless the bundle is calibrated for this label set."""
    threshold: float | None
    decision: bool | None
    operating: float | None
    """The probability on a scale where the threshold is 0.5."""
    reason: str | None
    """Why a label of a calibrated set has no probability."""


class OutOfDomain(Answer):
    """Whether the image is unlike those of the calibration, so that nothing else holds."""

    distance: float
    threshold: float
    flag: bool


class ImageFacts(Answer):
    """What was done to the pixels."""

    format: str
    width: int
    height: int
    frame: int | None
    channels: int
    deep: bool
    """More than 8 bits, which were windowed."""
    window: str | list[float] | None = None
    percentiles: list[float] | None = None
    inverted: bool | None = None
    resized_to: int
    resize_mode: str
    interpolation: str


class ImageOut(Answer):
    """One image: its findings, or why there are none."""

    labels: list[Finding] | None = None
    out_of_domain: OutOfDomain | None = None
    image: ImageFacts | None = None
    preview: str | None = None
    error: ProblemOut | None = None


class ClassifyOut(Envelope):
    """Findings, in the order of the images; labels are in the order of their set."""

    score_type: str
    rule: str
    """The score type with all that decides a score."""
    labelset: LabelSetOut
    calibration: str | None
    results: list[ImageOut]


class EmbedOut(Envelope):
    """Embeddings of unit norm, images first."""

    dim: int
    images: list[list[float]] | str
    texts: list[list[float]] | str
    image_facts: list[ImageFacts]


class HitOut(Answer):
    """One answer of a search."""

    rank: int
    score: float
    id: int
    study_id: str
    fields: dict[str, Any]
    text: str | None = None


class IndexOut(Answer):
    """Which index answered."""

    name: str
    hash: str
    modality: str
    size: int
    domain: str | None = None
    """Of a router, which of its indexes."""


class SearchOut(Envelope):
    """Hits, best first."""

    index: IndexOut
    hits: list[HitOut]
    image: ImageFacts | None = None


class FieldOut(Answer):
    """What a condition may be about."""

    name: str
    kind: str
    """text, number, date or label (1 present, 0 absent, -1 uncertain)."""
    values: list[str] | None
    lowest: str | None
    highest: str | None


class CalibrationOut(Answer):
    """A policy that keeps a risk under alpha, and how to ask for it to hold."""

    name: str
    risk: str
    alpha: float
    signal: str
    k: int
    queries: int
    where: list[str]
    modality: str
    other_patients: bool
    holds_for: str


class OffersOut(IndexOut):
    """All an index can be asked."""

    domains: list[str]
    text_included: bool
    thumbnails: bool
    fields: list[FieldOut]
    policies: list[str]
    calibrations: list[CalibrationOut]


class ThumbnailOut(Answer):
    """A JPEG in base64, or null."""

    id: int
    image: str | None


class ThumbnailsOut(Answer):
    """In the order of the ids."""

    request_id: str
    thumbnails: list[ThumbnailOut]
    timings_ms: Timings


class ExplainOut(Envelope):
    """A map over what the tower saw: the brighter, the more it moved the score. It does not say what is ill."""

    similarity: float
    method: str
    map: str
    """PNG, 8 bits grey, base64."""
    seen: str
    """What the tower saw, PNG in base64."""
    lowest: float
    highest: float
    """Relevance that black and white stand for."""
    image: ImageFacts


class HuggingFaceLabel(Answer):
    """Best first."""

    label: str
    score: float


class LabelsOf(LabelSetOut):
    """A label set of the bundle."""

    description: str
    default: bool
    calibration: str | None
    score_type: str
    rule: str
    labels: list["PromptsOf"]


class PromptsOf(Answer):
    """A label and its prompts."""

    name: str
    positive: list[str]
    negative: list[str]


class ModelsOut(Answer):
    """What is served."""

    model: ModelHashes
    dim: int
    image_size: int
    precision: str
    labelsets: list[str]
    indexes: list[IndexOut]
    can_explain: bool
    scopes: list[str]
    limits: dict[str, float]
    dicomweb: list[str]
    card: str
    version: str


class InferTensor(Answer):
    """A tensor of the Open Inference Protocol."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferOut(Answer):
    """The infer answer of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Any]
    outputs: list[InferTensor]
